"""The simulator sees: each planted bug breaks an invariant within a bounded number of seeds."""

import pytest

from tests.faults.mutations import MUTATIONS, Mutation, caught
from tests.faults.run import run
from tests.faults.shrink import shrink


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_caught(mutation: Mutation):
    assert caught(mutation, range(1, 151)) is not None


def test_a_failing_plan_shrinks_to_what_it_needs():
    mutation = next(mutation for mutation in MUTATIONS if "replay" in mutation.name)
    found = caught(mutation, range(1, 151))
    assert found is not None
    with mutation.planted():
        small = shrink(found.plan, lambda plan: run(plan).violation is not None, most=60)
        assert run(small).violation is not None
    # One crash in the middle of a task is what it takes.
    assert len(small.faults) < len(found.plan.faults)
    assert any(fault.kind.startswith("server") for fault in small.faults)
    assert run(small).violation is None
    assert mutation.plan(found.plan.seed) == found.plan
