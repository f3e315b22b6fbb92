"""Crash and restart at every boundary between two actions, one after the other: nothing is lost or counted twice."""

import dataclasses

import pytest

from tests.faults.plans import Buffered, Fault, Plan, draw
from tests.faults.run import run

LAST = 600


def plan(kind: str, who: str, boundary: int) -> Plan:
    """Two rounds in which nothing else goes wrong, deltas and updates in chunks; one node dies once."""
    calm = draw(0, "small")
    return dataclasses.replace(
        calm,
        clients=3,
        strangers=0,
        rounds=2,
        cohort=3,
        over_select=1.0,
        minimum=2,
        quorum=0,
        deadline=60.0,
        kind="quantized",
        feedback="residual",
        inline=0,
        window=2,
        uploads=1,
        hidden=8,
        buffers=False,
        weights="samples",
        momentum=0.5,
        every=2,
        evaluators=2,
        queue=1000,
        training=1.0,
        faults=(Fault(0.0, kind, who, 5.0, 0.5, boundary),),
        algorithm="fedavg",
    )


@pytest.mark.parametrize(("node", "who"), [("server", "server"), ("client", "c0")])
def test_a_crash_at_any_boundary_costs_nothing(node, who):
    struck = 0
    for boundary in range(1, LAST):
        kind = f"{node} kill" if boundary % 2 else f"{node} power cut"
        result = run(plan(kind, who, boundary))
        assert result.violation is None, f"boundary {boundary}: {result.violation!r}"
        if not result.faults[kind]:
            break
        struck += 1
    # The run ends before its last boundary: all of them were struck.
    assert 20 < struck < LAST - 1


@pytest.mark.parametrize(("node", "who"), [("server", "server"), ("client", "c0")])
def test_a_crash_costs_nothing_without_rounds(node, who):
    """At every eleventh boundary, which is quick; all of them hold."""
    struck = 0
    for boundary in range(5, LAST, 11):
        kind = f"{node} kill" if boundary % 2 else f"{node} power cut"
        result = run(dataclasses.replace(plan(kind, who, boundary), buffered=Buffered(2, 2, 0.5, 20)))
        assert result.violation is None, f"boundary {boundary}: {result.violation!r}"
        if not result.faults[kind]:
            break
        struck += 1
    assert 5 < struck < LAST // 11
