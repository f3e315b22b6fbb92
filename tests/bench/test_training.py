"""The training benchmark with tiny settings: every part runs and yields its fields. No time is held to anything."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent


def load(name: str) -> ModuleType:
    """A script's module, found as the scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return importlib.import_module(name)


parts, federations = load("parts"), load("federations")
SHORT = ["--seconds", "0.02", "--pairs", "1", "--attempts", "1"]


def run(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCH / "training.py"), *arguments, *SHORT],
        env=os.environ | {"FEDGE_BUILD": str(folder)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    folder = tmp_path_factory.mktemp("build")
    return folder, run(folder, "digits", "--threads", "1", "--chapters", "steps", "--beside", "channels_last")


def test_a_case_has_its_fields(done):
    folder, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((folder / "bench" / "training.json").read_text())
    (one,) = result["cases"]
    assert (one["model"], one["threads"]) == ("digits", 1)
    assert one["ratio"] == one["step_ms"] / one["torch_step_ms"] > 0
    assert one["ratio_quartiles"] == [one["ratio"]] * 2
    assert one["channels_last_step_ms"] > 0
    # Two 3x3 convolutions and two linear layers at batch 32, forward and backward, no gradient of the pixels.
    forward = [2 * 32 * n for n in (16 * 9 * 64, 32 * 16 * 9 * 64, 512 * 64, 64 * 10)]
    assert one["gflop"] == pytest.approx((3 * sum(forward) - forward[0]) / 1e9)
    assert one["of_limit"] == pytest.approx(one["gflop"] / result["gemm_gflops"]["1"] * 1e3 / one["step_ms"])
    assert result["geomean_ratio_1"] == pytest.approx(one["ratio"])
    assert result["geomean_ratio_2"] is None
    assert result["max_ratio"] == one["ratio"]
    assert result["failed"] == {}
    assert {"cpu", "cores", "versions"} <= set(result["machine"])
    assert "| digits CNN | 1 |" in (folder / "bench" / "training.md").read_text()


def test_finished_parts_are_not_kept_after_the_end(done):
    folder, _ = done
    assert not (folder / "bench" / "training.parts.json").exists()


def test_a_run_resumes_from_what_it_has_measured(tmp_path, capsys):
    path, key = tmp_path / "parts.json", {"machine": "this"}

    def fails() -> None:
        raise federations.BenchError("no")

    with pytest.raises(federations.BenchError):
        parts.Parts(path, key, fresh=False).get("a", fails, say=str)
    assert parts.Parts(path, key, fresh=False).get("a", lambda: 1, say=str) == 1
    assert parts.Parts(path, key, fresh=False).get("a", lambda: 2, say=str) == 1
    assert parts.Parts(path, key, fresh=True).get("a", lambda: 2, say=str) == 2
    assert parts.Parts(path, {"machine": "other"}, fresh=False).get("a", lambda: 3, say=str) == 3
    assert capsys.readouterr().out.count("a: ") == 3


def test_an_unknown_case_is_refused(tmp_path):
    process = run(tmp_path, "no-such-case")
    assert process.returncode == 2
    assert "'no-such-case' is no case; there are 2nn" in process.stderr


def test_peak_memory_is_that_of_the_program_alone(tmp_path):
    out = tmp_path / "peak"
    heavy = bytes(120 << 20)  # a parent's memory must not count
    for megabytes in (0, 64):
        program = [sys.executable, "-c", f"bytearray(b'x') * ({megabytes} << 20)"]
        subprocess.run([sys.executable, "-I", str(BENCH / "peak.py"), str(out), *program], check=True)
        assert megabytes << 20 < int(out.read_text()) < (megabytes << 20) + len(heavy) // 2
