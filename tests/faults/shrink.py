"""Make a failing plan small: fewer faults, clients and rounds, as long as it still fails (delta debugging).

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002: the minimising algorithm, over the
plan's list of faults.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.faults.plans import Plan


def shrink(plan: Plan, fails: Callable[[Plan], bool], *, most: int = 300) -> Plan:
    """The smallest plan found that ``fails``, within ``most`` tries; ``plan`` itself fails."""
    tries = 0

    def attempt(candidate: Plan) -> bool:
        nonlocal tries
        tries += 1
        return tries <= most and fails(candidate)

    for smaller in _simpler(plan):
        if attempt(smaller):
            plan = smaller
    parts = 2
    while plan.faults and tries < most:
        size = max(1, len(plan.faults) // parts)
        for start in range(0, len(plan.faults), size):
            candidate = plan.without(set(range(start, start + size)))
            if attempt(candidate):
                plan, parts = candidate, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts *= 2
    return plan


def _simpler(plan: Plan) -> Iterator[Plan]:
    """The plan without what most failures do not need, one thing at a time."""
    for change in (
        {"strangers": 0},
        {"every": 0},
        {"momentum": 0.0},
        {"buffers": False},
        {"over_select": 1.0},
        {"algorithm": "fedavg"},
    ):
        yield replace(plan, **change)  # type: ignore[arg-type]
    rounds = plan.rounds
    while rounds > 2:
        rounds = max(2, rounds // 2)
        yield replace(plan, rounds=rounds)
