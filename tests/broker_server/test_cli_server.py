"""Mistakes of the user's: one line, exit status 2, nothing half-written. And what the commands show."""

import json
import socket
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_server.database import Lock
from broker_server.findings import Findings
from broker_server.ledger import BEST, Ledger
from broker_server.records import Misconduct, Round, Task, Version
from edge_client import cli
from edge_client.bundle import Bundle
from tests.toy import toy_bundle, toy_data

TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"
state = "state"

[round]
cohort = 2

[evaluation]
data = "test.npz"

[stop]
rounds = 2

[simulation]
clients = 4
data = "train.npz"
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "toy.fedge").write_bytes(toy_bundle())
    np.savez(tmp_path / "test.npz", **toy_data(20))
    np.savez(tmp_path / "train.npz", **toy_data(40))
    path = tmp_path / "federation.toml"
    path.write_text(TOML)
    return path


@pytest.fixture
def fedge(monkeypatch, capsys):
    """Runs the command in this process: status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        code = ended.value.code
        return (0 if code is None else int(code)), shown.out, shown.err

    return run


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def cut(file: Path, name: str) -> None:
    path = file.with_name(name)
    path.write_bytes(path.read_bytes()[:-30])


CHANGES = {
    "unknown key": ("cohort = 2", "cohorts = 2", ["round.cohorts", "did you mean round.cohort"]),
    "unknown section": ("[stop]", "[stopp]", ["stopp is not a known key"]),
    "wrong type": ("cohort = 2", 'cohort = "two"', ["round.cohort", "'two'", "a whole number"]),
    "impossible": ("cohort = 2", "cohort = 0", ["round.cohort is 0", "from 1"]),
    "together": ("cohort = 2", "cohort = 2\nminimum = 3", ["round.minimum is 3", "at most round.cohort, 2"]),
    "nan": ("cohort = 2", "cohort = 2\ndeadline = nan", ["round.deadline"]),
    "no name": ('name = "toys"', "", ["federation.name is missing"]),
    "not toml": ("[round]", "[round", ["is not TOML"]),
    "bad url": ("[stop]", '[broker]\nurl = "http://x"\n[stop]', ["broker.url"]),
    "more than there are": ("clients = 4", "clients = 1", ["round.cohort is 2", "simulation.clients, 1"]),
}


@pytest.mark.parametrize("command", ["serve", "simulate"])
@pytest.mark.parametrize("change", CHANGES)
def test_mistakes_in_the_file(fedge, file, command, change):
    before, after, words = CHANGES[change]
    assert before in TOML
    file.write_text(TOML.replace(before, after))
    there = files(file.parent)
    status, _, errors = fedge(command, file)
    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith("fedge: ")
    for word in words:
        assert word in errors
    assert files(file.parent) == there


def foreign(path: Path) -> None:
    with Ledger.open(path / "ledger.db", federation="others", bundle="ab"):
        pass


BAD = {
    "no bundle": (lambda f: f.with_name("toy.fedge").unlink(), ["toy.fedge", "fedge export"]),
    "damaged bundle": (lambda f: cut(f, "toy.fedge"), ["bundle"]),
    "foreign bundle": (lambda f: f.with_name("toy.fedge").write_bytes(b"%PDF-1.4 ..."), ["bundle"]),
    "no data": (lambda f: f.with_name("test.npz").unlink(), ["test.npz"]),
    "data of another shape": (
        lambda f: np.savez(f.with_name("test.npz"), **toy_data(9, features=7)),
        ["7", "4"],
    ),
    "data without targets": (lambda f: np.savez(f.with_name("test.npz"), x=toy_data(9)["x"]), ["y"]),
    "foreign ledger": (lambda f: foreign(f.with_name("state")), ["belongs to", "others", "toys"]),
}


@pytest.mark.parametrize("damage", BAD)
def test_what_serve_cannot_use(fedge, file, damage):
    spoil, words = BAD[damage]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{free.getsockname()[1]}"
        file.write_text(TOML + f'[broker]\nurl = "{url}"\n')
        spoil(file)
        status, _, errors = fedge("serve", file)
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("fedge: ")]
    for word in words:
        assert word in line
    assert "Traceback" not in errors
    assert not file.with_name("state").joinpath("models").exists()


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_a_second_server_on_one_state_folder_touches_nothing(fedge, file, command):
    file.write_text(TOML.replace('data = "test.npz"\n', "").replace("clients = 4", "clients = 4\ntest_fraction = 0.5"))
    state = file.with_name("state")
    with Lock(state / "ledger.db"):
        there = files(file.parent)
        status, _, errors = fedge(command, file)
        assert status == 2
        assert "another server has it open" in errors
        assert "broker: " not in errors
        assert files(file.parent) == there


@pytest.mark.parametrize("damage", ["no bundle", "damaged bundle", "foreign bundle"])
def test_simulate_with_a_bad_bundle_writes_nothing(fedge, file, damage):
    file.write_text(TOML.replace('data = "test.npz"\n', "").replace("clients = 4", "clients = 4\ntest_fraction = 0.5"))
    spoil, words = BAD[damage]
    spoil(file)
    status, _, errors = fedge("simulate", file)
    assert status == 2
    assert all(word in errors for word in words)
    assert not file.with_name("state").exists()


@pytest.mark.parametrize("command", ["serve", "simulate", "status", "models"])
def test_a_file_that_is_not_there(fedge, tmp_path, command):
    status, _, errors = fedge(command, tmp_path / "none.toml")
    assert status == 2
    assert (
        errors
        == f"fedge: {tmp_path / 'none.toml'}: cannot be read (No such file or directory); name a federation file\n"
    )


@pytest.mark.parametrize("command", ["status", "models"])
def test_a_federation_that_was_never_served(fedge, file, command):
    status, _, errors = fedge(command, file)
    assert status == 2
    assert "has not been served yet" in errors
    assert not file.with_name("state").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "rounds=5"], "section.key=value"),
        (["--set", "stop.round=5"], "did you mean stop.rounds"),
        (["--set", "stop.rounds=many"], "stop.rounds is 'many'"),
        (["--clients", "0"], "0"),
        (["--clients", "1"], "round.cohort is 2"),
    ],
)
def test_options_of_simulate(fedge, file, options, words):
    there = files(file.parent)
    status, _, errors = fedge("simulate", file, *options)
    assert status == 2
    assert words in errors
    assert files(file.parent) == there


def test_status_and_models(fedge, file):
    digest = Bundle.open(file.with_name("toy.fedge")).digest
    with Ledger.open(file.with_name("state") / "ledger.db", federation="toys", bundle=digest) as ledger:
        assert "no round is finished yet" in fedge("status", file)[1]
        for number, accuracy in ((1, 0.75), (2, 0.5)):
            ledger.publish(Version(version=number, round=number, state=b"s"))
            ledger.finish_round(
                Round(
                    round=number,
                    version=number,
                    clients=2,
                    samples=9,
                    seconds=1.0,
                    bytes_up=2048,
                    bytes_down=4096,
                    metrics={"accuracy": accuracy},
                )
            )
        ledger.put(BEST, "1")
        ledger.open_task(
            Task(epoch=1, task=7, round=3, kind="train", version=2, cohort=("a", "b"), plan=b"", opened=0.0)
        )
        ledger.record(1, 7, "a", b"data", 5)
        # The server has the ledger open all the while.
        status, shown, _ = fedge("status", file)
        assert status == 0
        assert "0.7500" in shown
        assert "round 3: train under way, 1 of 2 results recorded" in shown
        status, shown, _ = fedge("models", file)
    assert status == 0
    best, last = (line for line in shown.splitlines() if "0.7500" in line or "0.5000" in line)
    assert "best" in best
    assert "last" in last


def test_status_tells_what_evaluations_found_to_people_and_to_programs(fedge, file):
    found = Findings(round=2, version=1, classes=("a", "b"), confusion=((3, 1), (0, 2)), clients={"confusion": 11})
    metrics = {"client_accuracy": 5 / 6, "client_accuracy_worst": 0.5}
    with Ledger.open(file.with_name("state") / "ledger.db", federation="toys", bundle="ab" * 32) as ledger:
        done = Round(round=2, version=1, clients=0, samples=0, seconds=1.0, bytes_up=0, bytes_down=0, metrics=metrics)
        ledger.finish_round(done)
        ledger.find(2, msgspec.json.encode(found))
        status, shown, _ = fedge("status", file)
        assert status == 0
        assert "0.7500" in shown
        assert "0.5000" in shown
        assert "round 2, version 1: told by clients: confusion by 11" in shown
        status, shown, _ = fedge("status", file, "--json")
    assert status == 0
    told = json.loads(shown)
    assert told["rounds"][0]["metrics"] == metrics
    assert told["findings"]["newest"]["confusion"] == [[3, 1], [0, 2]]
    assert told["findings"]["newest"]["by_class"][0] == {"name": "a", "samples": 4, "recall": 0.75, "precision": 1.0}


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_nobody_evaluates_where_nobody_is_asked_to(fedge, file, command):
    file.write_text(TOML.replace('data = "test.npz"', ""))
    status, _, errors = fedge(command, file, "--evaluate")
    assert status == 2
    assert 'round.mode is "evaluation" and nobody evaluates; set evaluation.clients or evaluation.data' in errors


def test_status_tells_what_clients_did_wrong(fedge, file):
    with Ledger.open(file.with_name("state") / "ledger.db", federation="toys", bundle="ab" * 32) as ledger:
        for number in range(12):
            ledger.accuse(Misconduct(1.8e9, f"x{number}", "muted", "it says [too] much", 60.0))
        ledger.accuse(Misconduct(1.8e9, "pi-7", "twin", "two devices", 0.0))
        _, shown, _ = fedge("status", file)
    assert "x11: not listened to for 60 s: it says [too] much" in shown
    assert "pi-7: two devices" in shown
    assert "x2:" not in shown


def test_status_of_a_federation_without_rounds(fedge, file):
    file.write_text(TOML.replace("cohort = 2", 'mode = "buffered"\nconcurrency = 4\nbuffer = 4'))
    with Ledger.open(file.with_name("state") / "ledger.db", federation="toys", bundle="ab" * 32) as ledger:
        for number, (client, version) in enumerate((("a", 3), ("b", 5), ("c", 6), ("d", 6)), 1):
            ledger.open_task(
                Task(
                    epoch=1,
                    task=number,
                    round=version + 1,
                    kind="train",
                    version=version,
                    cohort=(client,),
                    plan=b"",
                    opened=0.0,
                )
            )
        ledger.record(1, 2, "b", b"data", 5)
        status, shown, _ = fedge("status", file)
    assert status == 0
    assert "version 7: 1 of 4 updates recorded" in shown
    assert "3 clients have a task without an update, the oldest from 3 versions before" in shown
