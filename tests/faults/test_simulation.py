"""Federations under faults: seeds in a row, and those that once failed. Fresh ones: ``make simulate-faults``.

``FEDGE_FAULTS_SLICE`` is the number of processor seconds that the row gets, ``FEDGE_FAULTS_FIRST`` where it begins.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.plans import KINDS, Size, draw, either, without_rounds
from tests.faults.run import run
from tests.faults.shrink import shrink

SLICE = float(os.environ.get("FEDGE_FAULTS_SLICE", "20"))
FIRST = int(os.environ.get("FEDGE_FAULTS_FIRST", "1000000"))


def test_invariants_hold_for_seeds_in_a_row():
    began, federations, rounds = time.process_time(), 0, 0
    while time.process_time() - began < SLICE:
        seed = FIRST + federations
        size: Size = "mixed" if federations % 20 == 19 else "small"
        result = run(either(seed, size))
        federations, rounds = federations + 1, rounds + result.rounds
        if result.violation is not None:
            small = shrink(result.plan, lambda plan: run(plan).violation is not None, most=100)
            pytest.fail(f"seed {seed} ({size}): {result.violation!r}; the smallest plan found that fails: {small}")
    print(f"{federations} federations and {rounds} rounds from seed {FIRST}")
    assert rounds > 0


@pytest.mark.parametrize("seed", [152, 369, 540, 607, 754, 956, 1485, 1821, 2130])
def test_seeds_that_once_failed(seed):
    result = run(draw(seed, "small"))
    assert result.violation is None


@pytest.mark.parametrize("seed", [1, 14, 24, 33, 46, 2142])
def test_seeds_that_once_failed_without_rounds(seed):
    result = run(without_rounds(draw(seed, "small")))
    assert result.violation is None


def test_all_kinds_of_faults_are_drawn():
    assert {fault.kind for seed in range(200) for fault in draw(seed, "mixed").faults} == set(KINDS)


def test_a_seed_is_one_run_in_every_process():
    """Nothing depends on the order of sets, on the machine's clock or on its dice."""
    script = (
        "from tests.faults.plans import draw\n"
        "from tests.faults.run import run\n"
        "print([run(draw(seed, 'small')).digest for seed in range(5)])\n"
    )
    root = Path(__file__).parents[2]
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(number), "PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in (1, 2)
    }
    assert said == {f"{[run(draw(seed, 'small')).digest for seed in range(5)]}\n"}
