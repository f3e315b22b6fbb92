from dataclasses import dataclass, field

import pytest
from rich.console import Console

from broker_server.report import brief, human_bytes, plot_run, table


@dataclass(frozen=True)
class Row:
    round: int
    metrics: dict[str, float] = field(default_factory=dict)
    clients: int = 10
    seconds: float = 0.5
    bytes_up: int = 40_000
    bytes_down: int = 90_000


RUN = [Row(n, {"accuracy": 1 - 0.8**n, "loss": 2 * 0.8**n} if n % 2 else {}) for n in range(1, 12)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (99_960, "100 kB"),
        (999_999, "1.00 MB"),
        (6_653_480, "6.65 MB"),
        (3_000_000_000_000_000, "3000 TB"),
    ],
)
def test_bytes_are_read_at_a_glance(count, text):
    assert human_bytes(count) == text


def test_a_table_has_a_line_a_round_and_the_sums():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(RUN, title="digits"))
    lines = [line.split() for line in console.export_text().splitlines()]
    rows = [[cell for cell in line if cell not in "│┃"] for line in lines if line and line[0] in "│"]
    assert rows[0] == ["1", "0.2000", "10", "0.50", "40.0", "kB", "90.0", "kB"]
    assert rows[1] == ["2", "10", "0.50", "40.0", "kB", "90.0", "kB"]
    assert len(rows) == len(RUN) + 1
    assert rows[-1] == ["11", "0.9141", "110", "5.5", "440", "kB", "990", "kB"]


def test_beside_a_metric_stands_how_it_is_spread_over_clients():
    told = {"client_accuracy": 0.8, "client_accuracy_mean": 0.7, "client_accuracy_worst": 0.4}
    rounds = [Row(1, {"accuracy": 0.75}), Row(2, {"accuracy": 0.9, **told, "client_accuracy_spread": 0.1})]
    for metric in ("accuracy", "client_accuracy"):
        shown = table(rounds, metric=metric)
        assert [column.header for column in shown.columns][1:4] == [metric, "worst\n10 %", "spread"]
        assert [list(column.cells)[-1] for column in shown.columns][2:4] == ["0.4000", "0.1000"]
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(shown)
        assert metric != "accuracy" or "…" not in console.export_text(), "a terminal has room for it"
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([*rounds, Row(3, rounds[1].metrics | {"personal_accuracy": 0.95}, 1000, 86_400.5)]))
    assert "…" not in console.export_text(), "nor with the models that clients have for themselves"
    assert [column.header for column in table(rounds, metric="loss").columns][:3] == ["round", "loss", "clients"]
    assert brief(rounds[1].metrics | {"train_loss": 1.0, "train_loss_worst": 2.0}) == [
        "accuracy 0.9000",
        "client_accuracy 0.8000 (worst 10 % 0.4000, spread 0.1000)",
        "train_loss 1.0000",
    ]


def test_an_empty_run_has_a_table():
    assert table([]).row_count == 0


@pytest.mark.parametrize(
    ("rounds", "metric", "target", "fp32"),
    [
        (RUN, "accuracy", 0.95, (7_000_000, 7_000_000)),
        (RUN, "loss", None, (7_000_000, 14_000_000)),
        (RUN[:1], "accuracy", 0.95, (640_000, 640_000)),
        ([Row(1, bytes_up=0, bytes_down=0)], "accuracy", None, (1, 1)),
    ],
    ids=["accuracy", "loss", "one round", "nothing moved"],
)
def test_a_run_is_drawn(rounds, metric, target, fp32, tmp_path):
    path = tmp_path / "plots" / "run.png"
    plot_run(rounds, path, fp32_bytes_up=fp32[0], fp32_bytes_down=fp32[1], metric=metric, target=target, title="Digits")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
