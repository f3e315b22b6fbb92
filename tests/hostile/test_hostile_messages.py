"""Every message of the table, changed in every way, into both sides: what is wrong is dropped, counted, and no harm."""

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.wire import messages as m
from tests.hostile.mutate import is_message, mutate
from tests.hostile.peers import Phone, Table

SIDES = {
    "server": lambda: Table("synchronous"),
    "server without rounds": lambda: Table("buffered"),
    "client that downloads": lambda: Phone(uploading=False),
    "client that uploads": lambda: Phone(uploading=True),
}


@pytest.mark.parametrize("make", SIDES.values(), ids=SIDES)
def test_undisturbed_it_finishes_a_round(make):
    make().finish()


@pytest.mark.parametrize("kind", m.TABLE.values(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", SIDES.values(), ids=SIDES)
def test_every_kind_of_message_is_tried_on_both_sides(make, kind):
    """A kind that is added to the table fails here until `peers` knows valid ones of it."""
    side = make()
    known = side.messages().get(kind)
    assert known, f"no valid {kind.__name__} to be changed: add some to tests/hostile/peers.py"
    assert all(is_message(payload) for payload in known)
    dice = random.Random(kind.__name__)
    for _ in range(40):
        topic, payload = dice.choice(side.topics()), dice.choice(known)
        side.hear(topic, payload if dice.random() < 0.1 else mutate(payload, dice))
    side.finish()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SIDES)), st.integers(0, 2**32), st.integers(1, 30))
def test_whatever_is_heard_a_round_can_be_finished(name, seed, count):
    side, dice = SIDES[name](), random.Random(seed)
    known = [payload for payloads in side.messages().values() for payload in payloads]
    for _ in range(count):
        payload = mutate(dice.choice(known), dice)
        if dice.random() < 0.2:
            payload = dice.choice((b"", dice.randbytes(1024), dice.randbytes(904), dice.randbytes(70_000)))
        side.hear(dice.choice(side.topics()), payload)
    side.finish()


@pytest.mark.parametrize("make", SIDES.values(), ids=SIDES)
def test_a_flood_costs_no_memory(make):
    side, dice = make(), random.Random(5)
    known = [payload for payloads in side.messages().values() for payload in payloads]
    payloads = [mutate(dice.choice(known), dice) for _ in range(300)]
    topics = side.topics()
    tracemalloc.start()
    try:
        for number in range(1200):
            side.hear(dice.choice(topics), payloads[number % 300])
            if hasattr(side, "desk"):
                side.desk.actions.clear()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000
