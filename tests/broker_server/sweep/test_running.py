"""Runs in processes of their own: done once, ended together, none the victim of another."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_server.database import Lock
from broker_server.sweep.running import finished, run_all
from broker_server.sweep.runs import Run, plan
from edge_client.errors import ConfigError, FedgeError
from tests.broker_server.sweep.files import fake, federation, journal

ROOT = Path(__file__).parents[3]
WAITING, FAILING = {"train.hypers.momentum": 0.5}, {"train.hypers.weight_decay": 0.5}


def runs(**extra):
    return [Run(name, {"train.hypers.lr": lr, **extra.get(name, {})}, 3) for name, lr in (("a", 0.5), ("b", 0.25))]


@pytest.fixture
def file(tmp_path):
    return federation(tmp_path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def sweep(file, folder, wanted, **more):
    lines = []
    return run_all(file, wanted, folder, log=lines.append, command=fake, **more), lines


def test_results_are_returned_in_order_and_are_on_the_disk(file, folder):
    results, lines = sweep(file, folder, runs(), jobs=2)
    assert list(results) == ["a", "b"]
    assert results["a"]["rounds"][0]["metrics"] == {"accuracy": 0.5, "loss": None}
    assert (results["b"]["bytes_up"], results["b"]["run"]["seed"]) == (11, 3)
    assert results["b"]["run"]["settings"] == {"train.hypers.lr": 0.25}
    for name, result in results.items():
        home = folder / "runs" / name
        assert json.loads((home / "result.json").read_text()) == result
        assert {path.name for path in home.iterdir()} == {"federation.toml", "log.txt", "result.json"}
    assert lines[0] == "2 runs: 0 are there, 2 to go, 2 at a time"
    assert "accuracy 0.5000, 1 rounds in 1.0 s" in "".join(lines[1:])
    assert lines[1].startswith("[1/2] ")
    assert "1 left, about" in lines[1]
    assert lines[2].endswith("; none left")


def test_what_is_done_is_not_done_again(file, folder):
    first, _ = sweep(file, folder, runs())
    again, lines = sweep(file, folder, runs())
    assert again == first
    assert lines == ["2 runs: 2 are there, 0 to go, 1 at a time"]
    assert journal(folder) == ["a", "b"]


def test_what_has_other_settings_by_now_is_done_again(file, folder):
    sweep(file, folder, runs())
    results, lines = sweep(file, folder, runs(b={"train.epochs": 2}))
    assert journal(folder) == ["a", "b", "b"]
    assert lines[0] == "2 runs: 1 are there, 1 to go, 1 at a time"
    assert lines[1].startswith("[2/2] b: ")
    assert results["b"]["run"]["settings"]["train.epochs"] == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"rounds": []}'])
def test_a_damaged_result_is_none(file, folder, damage):
    sweep(file, folder, runs())
    (folder / "runs" / "a" / "result.json").write_bytes(damage)
    assert list(finished(plan(file, runs()), folder)) == ["b"]


def test_a_run_that_fails_stops_no_other_and_is_tried_again(file, folder):
    results, lines = sweep(file, folder, runs(a=FAILING))
    assert list(results) == ["b"]
    assert "a: failed: the model is not a number (all it said: " in lines[1]
    assert (folder / "runs" / "a" / "log.txt").read_text() == "round 1\nfedge: the model is not a number\n"
    sweep(file, folder, runs(a=FAILING))
    assert journal(folder) == ["a", "b", "a"]


def test_a_run_that_writes_no_result_has_failed(file, folder):
    lines = []
    found = run_all(file, runs()[:1], folder, log=lines.append, command=lambda *_: [sys.executable, "-c", ""])
    assert found == {}
    assert "failed: it wrote no result" in lines[1]


def test_state_is_kept_where_that_is_asked_for(file, folder):
    sweep(file, folder, runs(), keep=True)
    assert (folder / "runs" / "a" / "state").is_dir()


def test_nothing_is_started_where_one_run_is_not_possible(file, folder):
    with pytest.raises(ConfigError, match="run b: "):
        sweep(file, folder, runs(b={"round.cohort": 0}))
    assert not folder.exists()


def test_a_second_sweep_of_a_folder_touches_nothing(file, folder):
    with Lock(folder / "sweep"), pytest.raises(FedgeError, match="another sweep uses it"):
        sweep(file, folder, runs())
    assert journal(folder) == []


def test_a_folder_that_cannot_be_made(file):
    with pytest.raises(ConfigError, match=r"federation\.toml/out: cannot be made"):
        sweep(file, file / "out", runs())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_ends_early_ends_its_runs_and_goes_on_later(file, folder, number):
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    script = (
        "from pathlib import Path\n"
        "from tests.broker_server.sweep.files import fake\n"
        "from tests.broker_server.sweep.test_running import WAITING, run_all, runs\n"
        f"run_all(Path({str(file)!r}), runs(b=WAITING), Path({str(folder)!r}), jobs=1, command=fake)\n"
    )
    sweeping = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    with (folder / "pipe").open("rb") as pipe:
        assert pipe.read(1) == b"!"
        sweeping.send_signal(number)
        # The pipe ends with the run that holds it.
        assert pipe.read() == b""
    status = sweeping.wait()
    assert status == (-9 if number == signal.SIGKILL else 128 + number)
    assert list(finished(plan(file, runs(b=WAITING)), folder)) == ["a"]
    assert (folder / "runs" / "b" / "state").exists()
    results, _ = sweep(file, folder, runs())
    assert list(results) == ["a", "b"]
    assert journal(folder) == ["a", "b", "b"]


def test_signals_mean_afterwards_what_they_meant_before(file, folder):
    def own(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own), signal.getsignal(signal.SIGINT)
    try:
        sweep(file, folder, runs()[:1])
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (own, before[1])
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_runs_share_the_cores(file, folder):
    sweep(file, folder, runs(b={"simulation.slots": 7}), jobs=os.cpu_count())
    text = [(folder / "runs" / name / "federation.toml").read_text() for name in ("a", "b")]
    assert "slots = 1\n" in text[0]
    assert "slots = 7\n" in text[1]
    shutil.rmtree(folder)
    sweep(file, folder, runs(), jobs=1)
    assert f"slots = {os.cpu_count()}\n" in (folder / "runs" / "a" / "federation.toml").read_text()
