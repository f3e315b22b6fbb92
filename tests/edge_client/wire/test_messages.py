"""Messages: one table of examples drives round trip, truncation and hostile bytes; only WireError ever comes out."""

import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.errors import WireError
from edge_client.wire import messages as m

HASH = bytes(range(32))
BOOT = b"bootboot"
INLINE = m.BlobRef(HASH, 3, 1024, b"abc")
CHUNKED = m.BlobRef(HASH, 2**30, 65536)
INVITATION = m.Invitation(
    7, 9, 3, "train", m.TrainPlan(2, 0, 16, {"lr": 0.1}), m.UpdatePlan(), 5, 60.0, 1, 2, HASH, CHUNKED
)
CONDITION = m.Condition(
    41.5,
    2**33,
    2**28,
    2**20,
    "48 degrees",
    "cp311-aarch64",
    m.Progress("0.2.0rc1", "back", "no word", b"8 bytes."),
)
EXAMPLES = [
    m.Hello(1, BOOT, HASH, 4, HASH, 100, True, m.Traffic(5, 6), "pi", 0.0, CONDITION),
    m.Hello(1, BOOT, HASH, 4, HASH, 100, True, m.Traffic(5, 6), "pi"),
    m.Hello(2**48, BOOT, HASH, 0, HASH, 0, False),
    m.Goodbye(BOOT),
    m.Upload(1, 2, INLINE, m.Traffic(1, 2)),
    m.Upload(1, 2, CHUNKED),
    m.Decline(1, 2, "not available"),
    m.Missing(HASH, (0, 1, 4095)),
    m.Offer("demo", 7, CHUNKED, 2.5, 30.0, True),
    m.Offer("demo", 7, INLINE, 0.0),
    INVITATION,
    msgspec.structs.replace(
        INVITATION, kind="evaluate", delta=None, update=m.UpdatePlan("none", "nmse", 0.5, "none", 9)
    ),
    m.Credit(HASH, ()),
    m.Receipt(1, 2, "refused", "too large"),
    m.Release(b"what it is", bytes(64)),
]


def ids(message):
    return type(message).__name__


def envelope(body, *, protocol=m.PROTOCOL, number=2):
    return msgspec.msgpack.encode([protocol, number, body, b""])


def test_the_table_has_no_gaps_and_every_message_is_in_it_once():
    assert list(m.TABLE) == list(range(1, len(m.TABLE) + 1))
    assert set(m.TABLE.values()) == set(get_args(m.Message))
    assert len(set(m.TABLE.values())) == len(m.TABLE)
    assert {type(example) for example in EXAMPLES} == set(m.TABLE.values())


@pytest.mark.parametrize("message", EXAMPLES, ids=ids)
def test_round_trip(message):
    payload = m.encode(message)
    assert m.decode(payload) == message
    protocol, number, *_ = msgspec.msgpack.decode(payload)
    assert (protocol, m.TABLE[number]) == (m.PROTOCOL, type(message))


@pytest.mark.parametrize("message", EXAMPLES, ids=ids)
def test_every_prefix_and_every_trailing_byte_is_refused(message):
    payload = m.encode(message)
    for end in range(len(payload)):
        with pytest.raises(WireError):
            m.decode(payload[:end])
    with pytest.raises(WireError):
        m.decode(payload + b"\0")


def test_the_bytes_of_a_message_do_not_change():
    assert m.encode(m.Goodbye(BOOT)).hex() == "94010291c408" + BOOT.hex() + "c400"
    assert m.encode(m.Receipt(1, 2, "late")).hex() == "94010994" + "0102" + "a4" + b"late".hex() + "a0" + "c400"


def test_a_plan_of_before_measures_is_understood_and_a_longer_one_by_who_knows_less():
    fields = list(msgspec.structs.astuple(change(INVITATION, plan=m.TrainPlan(2, 0, 16, {"lr": 0.1}, True))))
    fields[4:6] = ([2, 0, 16, {"lr": 0.1}], list(msgspec.structs.astuple(fields[5])))
    fields[11] = list(msgspec.structs.astuple(fields[11]))
    assert m.decode(envelope(fields, number=7)) == INVITATION
    fields[4] = [*msgspec.to_builtins(m.TrainPlan(2, 0, 16, {"lr": 0.1})), "of a version to come"]
    assert m.decode(envelope(fields, number=7)) == INVITATION


def test_a_hello_of_before_uplinks_is_understood_and_a_longer_one_by_who_knows_less():
    before = change(EXAMPLES[0], uplink=1e6, condition=m.Condition())
    fields = list(msgspec.structs.astuple(before))
    assert m.decode(envelope(fields[:-2], number=1)) == change(before, uplink=0.0)
    assert m.decode(envelope([*fields, "what comes later"], number=1)) == before


def test_a_hello_of_before_conditions_is_understood_and_one_with_more_of_them_by_who_knows_less():
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(EXAMPLES[0]))
    assert m.decode(envelope(fields[:-1], number=1)) == change(EXAMPLES[0], condition=m.Condition())
    for known in range(len(fields[-1])):
        less = m.decode(envelope([*fields[:-1], fields[-1][:known]], number=1))
        assert less.condition == m.Condition(*msgspec.structs.astuple(CONDITION)[:known])
    assert m.decode(envelope([*fields[:-1], [*fields[-1], "what comes later"]], number=1)) == EXAMPLES[0]


def test_an_invitation_of_before_void_ones_is_understood():
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(change(INVITATION, void=(6, 1))))
    assert m.decode(envelope(fields, number=7)) == change(INVITATION, void=(6, 1))
    assert m.decode(envelope(fields[:-1], number=7)) == INVITATION


@pytest.mark.parametrize("protocol", [0, 2, -1, 2**63])
def test_another_protocol_is_named(protocol):
    with pytest.raises(WireError, match=rf"protocol {protocol}; this side speaks {m.PROTOCOL}"):
        m.decode(envelope([BOOT], protocol=protocol))


@pytest.mark.parametrize("number", [0, 11, -1, 2**40])
def test_an_unknown_number_is_named(number):
    with pytest.raises(WireError, match=f"message number {number}; known are 1 to 10"):
        m.decode(envelope([BOOT], number=number))


change = msgspec.structs.replace
OUT_OF_BOUNDS = {
    "negative": m.Decline(-1, 2, ""),
    "too large a number": m.Decline(2**48 + 1, 2, ""),
    "short boot": m.Goodbye(b"1234567"),
    "long boot": m.Goodbye(b"123456789"),
    "short hash": m.Credit(b"1" * 31, ()),
    "long hash": m.Missing(b"1" * 33, ()),
    "long reason": m.Decline(1, 2, "x" * 501),
    "long software": change(EXAMPLES[0], software="x" * 65),
    "indices": m.Credit(HASH, tuple(range(4097))),
    "negative index": m.Missing(HASH, (-1,)),
    "kind": change(INVITATION, kind="mask"),
    "status": m.Receipt(1, 2, "lost"),
    "deadline": change(INVITATION, deadline=math.nan),
    "endless deadline": change(INVITATION, deadline=math.inf),
    "spread": m.Offer("demo", 1, INLINE, -1.0),
    "spread not a number": m.Offer("demo", 1, INLINE, math.nan),
    "heartbeat": m.Offer("demo", 1, INLINE, 1.0, 0.0),
    "federation": m.Offer("de/mo", 1, INLINE, 1.0),
    "federation with a line feed": m.Offer("demo\n", 1, INLINE, 1.0),
    "chunk below": m.Upload(1, 2, change(CHUNKED, chunk=1023)),
    "chunk above": m.Upload(1, 2, change(CHUNKED, chunk=2**20 + 1)),
    "size": m.Upload(1, 2, change(CHUNKED, size=-1)),
    "inline": m.Upload(1, 2, change(INLINE, inline=bytes(m.INLINE_LIMIT + 1))),
    "epochs": change(INVITATION, plan=m.TrainPlan(epochs=0)),
    "steps": change(INVITATION, plan=m.TrainPlan(steps=10_000_001)),
    "batch": change(INVITATION, plan=m.TrainPlan(batch_size=65_537)),
    "hyper name": change(INVITATION, plan=m.TrainPlan(hypers={"x" * 65: 1.0})),
    "hyper value": change(INVITATION, plan=m.TrainPlan(hypers={"lr": math.nan})),
    "hypers": change(INVITATION, plan=m.TrainPlan(hypers={str(n): 1.0 for n in range(65)})),
    "rate": change(INVITATION, update=m.UpdatePlan(value=0.0)),
    "rate not a number": change(INVITATION, update=m.UpdatePlan(value=math.nan)),
    "target": change(INVITATION, update=m.UpdatePlan(target="energy")),
    "feedback": change(INVITATION, update=m.UpdatePlan(feedback=True)),
    "limit": change(INVITATION, update=m.UpdatePlan(limit=-1)),
    "void": change(INVITATION, void=(1, -1)),
    "uplink": change(EXAMPLES[0], uplink=-1.0),
    "degrees": change(EXAMPLES[0], condition=m.Condition(degrees=math.nan)),
    "disk": change(EXAMPLES[0], condition=m.Condition(disk=-1)),
    "platform": change(EXAMPLES[0], condition=m.Condition(platform="cp311-../..")),
    "stage": change(EXAMPLES[0], condition=m.Condition(progress=m.Progress("1", "lost"))),
    "a version that is a path": change(EXAMPLES[0], condition=m.Condition(progress=m.Progress("../1", "back"))),
    "a short signature of a release": m.Release(b"", bytes(63)),
    "a long record": m.Release(bytes(m.INLINE_LIMIT + 1), bytes(64)),
    "uplink not a number": change(EXAMPLES[0], uplink=math.nan),
    "traffic": m.Upload(1, 2, INLINE, m.Traffic(-1, 0)),
}


@pytest.mark.parametrize("message", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS)
def test_a_field_out_of_bounds_is_refused(message):
    with pytest.raises(WireError, match=type(message).__name__):
        m.decode(m.encode(message))


WRONG = {
    "empty": b"",
    "a map": msgspec.msgpack.encode({"protocol": 1}),
    "too short": msgspec.msgpack.encode([1, 2]),
    "a body that is a number": envelope(7),
    "a body with a field too few": envelope([]),
    "text that is not UTF-8": b"\x94\x01\x09\x93\x01\x02\xa4\xff\xff\xff\xff\xc4\x00",
    "nested without end": b"\x93\x01\x02" + b"\x91" * 100_000 + b"\xc0",
    "an array that claims 4 G entries": b"\x94\x01\x08\x92\xc4\x20" + HASH + b"\xdd\xff\xff\xff\xff",
    "a plan of an unknown kind": m.encode(INVITATION).replace(b"\xa9quantized", b"\xa9quantizer"),
    "a long signature": msgspec.msgpack.encode([1, 2, [BOOT], bytes(65)]),
}


@pytest.mark.parametrize("payload", WRONG.values(), ids=WRONG)
def test_what_is_no_message_is_refused(payload):
    with pytest.raises(WireError):
        m.decode(payload)


def test_an_oversized_payload_is_dropped_unread():
    m.decode(m.encode(m.Missing(HASH, (2**40,) * 4096)))
    with pytest.raises(WireError, match="131073 bytes; at most 131072"):
        m.decode(b"\xc1" * (m.MESSAGE_LIMIT + 1))


def decoded(payload):
    try:
        return m.decode(payload)
    except WireError:
        return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(payload):
    decoded(payload)


_BODIES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(-1, 12), _BODIES)
def test_random_bodies_raise_nothing_else(number, body):
    decoded(envelope(body, number=number))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.sampled_from(EXAMPLES), st.data())
def test_a_changed_byte_gives_a_valid_message_or_an_error(message, data):
    payload = bytearray(m.encode(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    found = decoded(bytes(payload))
    assert found is None or m.decode(m.encode(found)) == found
