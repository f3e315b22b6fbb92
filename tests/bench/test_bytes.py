"""The benchmark of bytes: what it compares is the same federation, and it counts as it says."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from broker_server.broker import find_mosquitto
from tests.datasets import require

BENCH = Path(__file__).parent


def load(name: str) -> ModuleType:
    """A script's module, found as the scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return importlib.import_module(name)


curves, stc, ternary = load("curves"), load("contenders.stc"), load("ternary_federation")
Curve = curves.Curve


def test_what_counts_is_the_mean_of_five_evaluations():
    curve = Curve([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1, 2, 3, 4, 5, 6])
    assert np.isnan(curve.smoothed()[:4]).all()
    assert curve.smoothed()[4:] == pytest.approx([0.3, 0.4])
    assert curve.reaches(0.4) == 6
    assert curve.reaches(0.304) == 5
    assert curve.reaches(0.41) is None
    assert Curve([0.2, 0.4], [1, 2]).smoothed()[1] == pytest.approx(0.3)


def test_contenders_are_compared_where_they_reach_what_fp32_has_after_its_budget():
    rounds = np.arange(1, 15)
    fp32 = Curve(np.minimum(rounds, 10) / 10, 1000 * rounds)
    slow = Curve(np.minimum(rounds, 12) / 12, 10 * rounds)
    never = Curve(np.full(14, 0.3), 5 * rounds)
    found = curves.compare({"fp32": [fp32] * 2, "fedge": [slow] * 2, "stc": [slow, never]}, 10)
    assert found["target_accuracy"] == pytest.approx(0.8)
    assert (found["fp32_rounds"], found["fedge_rounds"]) == (10, 12)
    assert found["fedge_factor"] == pytest.approx(10_000 / 120)
    assert found["fedge_lag"] == pytest.approx(1.2)
    assert found["stc_factor"] is None
    assert [seed["reached"] for seed in found["seeds"]["stc"]] == [True, False]
    assert found["seeds"]["stc"][1] == {"reached": False, "rounds": 14, "bytes": 70, "accuracy": pytest.approx(0.3)}


def test_the_sum_of_missed_ternary_updates_takes_what_is_shortest():
    rng = np.random.default_rng(0)
    updates = [stc.compress(rng.standard_normal(5000).astype(np.float32), 0.01) for _ in range(3)]
    assert ternary.partial_sum_bits([], 5000) == 0
    assert 0 < ternary.partial_sum_bits(updates[:1], 5000) <= updates[0].bits()
    assert ternary.partial_sum_bits(updates, 5000) <= sum(update.bits() for update in updates)
    again = ternary.partial_sum_bits(updates[:1] * 3, 5000)
    assert again < 2 * updates[0].bits()
    dense = [stc.compress(rng.standard_normal(50).astype(np.float32), 1.0) for _ in range(90)]
    assert ternary.partial_sum_bits(dense, 50) == 1600


def test_a_small_run_yields_every_field(tmp_path):
    require("tinyshakespeare")
    if find_mosquitto() is None:
        pytest.skip("needs the Debian package mosquitto")
    variables = {"FEDGE_BUILD": str(tmp_path), "FEDGE_ROUNDS": "2", "FEDGE_CLIENTS": "6", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "bytes.py"), "shakespeare", "--seeds", "1"]
    first = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    (case,) = json.loads((tmp_path / "bench" / "bytes.json").read_text())["cases"]
    assert case["name"] == "shakespeare"
    for name in ("fp32", "fedge", "stc"):
        assert case[f"{name}_bytes"] > 0
        assert 0 <= case[f"{name}_accuracy"] <= 1
        assert case[f"{name}_rounds"] in (2, 3)
    # Three updates a round in floats, of 65 thousand parameters, and the model from the second round on.
    assert 9 * 4 * 63_000 < case["fp32_bytes"] < 9 * 4 * 68_000
    assert case["fedge_bytes"] < case["fp32_bytes"] / 20
    assert 6 * case["bundle_bytes"] < case["joining_bytes"] < 6.2 * case["bundle_bytes"] + 6 * 1000
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bench" / "bytes").glob("*.json")}
    again = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert "shakespeare: " in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "bench" / "bytes").glob("*.json")} == kept
