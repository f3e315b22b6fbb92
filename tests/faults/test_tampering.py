"""Federations that sign, through a broker that lies: it may delay them, and deceives nobody."""

import itertools
import time

import pytest

from tests.faults.plans import draw, either
from tests.faults.run import run
from tests.faults.test_simulation import FIRST, SLICE


def test_invariants_hold_for_seeds_in_a_row_whatever_the_broker_does():
    began, rounds, struck = time.process_time(), 0, 0
    for seed in itertools.count(FIRST):
        result = run(either(seed, "small"), signed=True, tampering=0.15)
        assert result.violation is None, f"seed {seed}"
        rounds += result.rounds
        struck += sum(count for kind, count in result.faults.items() if kind.startswith("tampering"))
        if time.process_time() - began > SLICE / 4:
            break
    print(f"{rounds} rounds from seed {FIRST}, {struck} messages tampered with")
    assert rounds > 0
    assert struck > 0


@pytest.mark.parametrize("seed", [7, 10, 12, 5000200, 5002005, 5002052])
def test_signing_federations_go_on_where_others_were_deceived_or_stuck(seed):
    share = 0.1 if seed < 1000 else 0.15
    assert run(either(seed, "small"), signed=True, tampering=share).violation is None


def test_without_signatures_the_same_broker_deceives():
    results = (run(either(seed, "small"), tampering=0.1) for seed in range(1, 100))
    assert any(result.violation is not None for result in results)


def test_a_seed_is_one_run():
    first, again = (run(draw(3, "small"), signed=True, tampering=0.2) for _ in range(2))
    assert (first.digest, first.faults) == (again.digest, again.faults)
