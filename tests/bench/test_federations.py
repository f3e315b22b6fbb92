"""The benchmarks themselves take minutes; what they are made of is held here."""

import importlib.util
import sys
from pathlib import Path

import pytest

from broker_server.config import load

SPEC = importlib.util.spec_from_file_location("fedge_bench_federations", Path(__file__).with_name("federations.py"))
federations = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = federations  # dataclasses look their module up
SPEC.loader.exec_module(federations)


@pytest.mark.parametrize("name", federations.RUNS)
def test_a_federation_file_says_what_the_run_says(name, tmp_path):
    run = federations.RUNS[name]
    sections = {"federation": {"name": "bench", "bundle": "model.fedge"}} | dict(run.sections)
    sections |= {"server": {"options": {"momentum": 0.5}}}
    path = tmp_path / "federation.toml"
    path.write_text(federations.toml(sections))
    federation = load(path)
    assert federation.round.cohort == run.sections["round"]["cohort"]
    assert federation.server.options == {"momentum": 0.5}
    assert federation.train.hypers == run.sections["train.hypers"]
    assert federation.simulation.split == run.sections["simulation"]["split"]


def test_a_failing_command_says_where_its_output_is(tmp_path):
    script = "import sys; print('out'); print('what went wrong', file=sys.stderr); sys.exit(3)"
    with pytest.raises(federations.BenchError, match=r"ended with status 3: what went wrong \(all it said: .*log\.txt"):
        federations.command([sys.executable, "-c", script], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "out\nwhat went wrong\n"


def test_a_stuck_command_is_ended(tmp_path):
    script = "import signal; signal.pause()"
    with pytest.raises(federations.BenchError, match="took more than 0 s"):
        federations.command([sys.executable, "-c", script], tmp_path / "log.txt", timeout=0.2)


def test_results_are_written_whole(tmp_path):
    path = tmp_path / "build" / "result.json"
    federations.write_json(path, {"ratio": 1.0})
    assert path.read_text() == '{\n  "ratio": 1.0\n}\n'
    assert list(path.parent.iterdir()) == [path]
