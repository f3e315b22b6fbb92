import msgspec
from rich.console import Console

from broker_server.findings import Findings, Histogram
from broker_server.findings_table import lines, read_findings, tables


def histogram(name="x", bins=(1, 3), mean=0.25, high=1.0) -> Histogram:
    return Histogram(name, 0.0, high, 2, tuple(bins), 0, mean, 0.5)


def findings(number=1, **more) -> Findings:
    return Findings(round=number, version=number, clients={"confusion": 12, "labels": 3}, least=10, **more)


def shown(*found: Findings) -> list[str]:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(found):
        console.print(table)
    return [" ".join(line.strip("│┃").replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_classes_are_shown_with_what_is_trained_on():
    found = findings(classes=("cat", "dog"), confusion=((3, 1), (0, 0)), labels=(7, 9))
    text = shown(found)
    assert "cat 4 0.7500 1.0000 7" in text
    assert "dog 0 0.0000 9" in text
    assert lines([found]) == [
        "round 1, version 1: told by clients: confusion by 12, labels by 3",
        "labels: told by 3; sums over fewer than analytics.least, 10, are not kept",
    ]


def test_of_many_classes_those_are_shown_that_the_model_knows_least():
    confusion = [[0] * 50 for _ in range(50)]
    for number in range(50):
        confusion[number][number], confusion[number][0] = number, 50 - number
    confusion[0][0] = 50
    text = shown(findings(classes=tuple(f"c{number}" for number in range(50)), confusion=confusion))
    names = [line.split()[0] for line in text if line.startswith("c") and "class" not in line]
    assert names == [f"c{number}" for number in range(1, 21)], "c0 is known best"
    assert "20 of 50 classes, those with the lowest recall" in text


def test_how_far_data_has_changed_since_the_first_time():
    first = findings(1, features=(histogram("x[0]"), histogram("x[1]"), histogram("x[2]")), labels=(5, 5))
    now = findings(
        9,
        features=(histogram("x[0]"), histogram("x[1]", bins=(4, 0), mean=None), histogram("x[2]", high=2.0)),
        labels=(9, 1),
    )
    text = shown(first, now)
    assert "x[0] 0.2500 0.5000 2 4 0 0.000" in text
    assert "x[1] 0.5000 2 4 0 0.500" in text
    assert "x[2] 0.2500 0.5000 2 4 0" in text, "another range is not compared"
    assert "labels have changed by 0.400 since round 1 (0 not at all, 1 entirely)" in lines([first, now])


def test_nothing_found_shows_nothing():
    assert (shown(), lines([]), read_findings([])) == ([], [], [])


def test_findings_survive_the_ledger():
    found = findings(3, features=(histogram(),), classes=("a",), confusion=((4,),), labels=(2,))
    assert read_findings([msgspec.json.encode(found)]) == [found]
