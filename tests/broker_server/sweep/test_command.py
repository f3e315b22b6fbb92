"""``fedge simulate --sweep``, with real federations."""

import csv
import sys

import pytest

from edge_client import cli
from tests.broker_server.sweep.files import federation

SWEEP = """\
seeds = [0, 1]
[[runs]]
name = "plain"
[[runs]]
name = "bad"
simulation.data = "broken.npz"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    # A file that is there and no data: only the run finds out.
    (tmp_path / "broken.npz").write_bytes(b"no")
    return federation(tmp_path)


@pytest.fixture
def fedge(file, monkeypatch, capsys):
    """Sweeps in this process: status, standard error."""

    def run(*options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedge", "simulate", str(file), *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_of_real_federations_some_of_which_fail(fedge, tmp_path):
    folder = tmp_path / "out"
    options = ("--sweep", tmp_path / "sweep.toml", "-o", folder, "--jobs", 2, "--set", "stop.rounds=1")
    status, said = fedge(*options)
    assert status == 1
    assert "bad-seed=0: failed: " in said
    assert "broken.npz: " in said
    assert "failed: bad-seed=0, bad-seed=1; the same command tries them again" in said
    assert "±" in said
    found = lines(folder / "results.csv")
    assert [row["name"] for row in found] == ["plain-seed=0", "plain-seed=1"]
    assert all(row["rounds"] == "1" and float(row["metrics.accuracy"]) >= 0 for row in found)
    assert len({row["metrics.loss"] for row in found}) == 2
    assert [(row["variant"], row["runs"]) for row in lines(folder / "summary.csv")] == [("plain", "2")]
    assert not (folder / "runs" / "plain-seed=0" / "state").exists()
    (tmp_path / "sweep.toml").write_text(SWEEP[: SWEEP.rindex("[[runs]]")])
    status, said = fedge(*options)
    assert status == 0
    assert "2 runs: 2 are there, 0 to go" in said
    assert [row["name"] for row in lines(folder / "results.csv")] == [row["name"] for row in found]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "sweep.toml"], "-o FOLDER"),
        (["--sweep", "sweep.toml", "-o", "out", "--json", "x.json"], "neither --json"),
        (["-o", "out"], "add --sweep FILE"),
        (["--jobs", "2"], "add --sweep FILE"),
        (["--track", "mlflow"], "add --sweep FILE"),
        (
            ["--sweep", "sweep.toml", "-o", "out", "--set", "simulation.data=broken.npz"],
            "simulation.data is set for all runs",
        ),
        (["--sweep", "sweep.toml", "-o", "out", "--clients", "1"], "run plain-seed=0: "),
        (["--sweep", "none.toml", "-o", "out"], "none.toml: cannot be read"),
    ],
)
def test_mistakes_start_nothing(fedge, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    status, said = fedge(*options)
    assert status == 2
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "x.json").exists()
