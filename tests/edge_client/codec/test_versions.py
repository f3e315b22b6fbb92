"""Versions of the global model: deltas between any two of them lead to the same bits, and damage never passes."""

import contextlib
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.vector import decode_vector
from edge_client.codec.versions import (
    CODES_LIMIT,
    CodedState,
    RawState,
    add_codes,
    apply_delta,
    encode_delta,
    pack_state,
    unpack_state,
)
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import code

LAYOUT = Layout((TensorSpec("w", (20, 30)), TensorSpec("b", (20,))))
CODES = tuple(code(LAYOUT, seed) for seed in range(6))
ORIGIN = CodedState(LAYOUT)
VERSIONS = [
    ORIGIN,
    CodedState(LAYOUT, CODES[:1]),
    CodedState(LAYOUT, CODES[:3]),
    CodedState(LAYOUT, (*CODES[:2], CODES[4])),
    CodedState(LAYOUT, (CODES[5], b"", CODES[1])),
    CodedState(LAYOUT, CODES[5:]),
]


def raw(seed):
    return RawState(np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32))


@pytest.mark.parametrize(("old", "new"), list(permutations(VERSIONS, 2)))
def test_a_delta_between_any_two_versions_leads_to_the_same_bits(old, new):
    found = apply_delta(old, encode_delta(old, new), LAYOUT)
    assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.offset, new.offset)


def test_a_delta_holds_only_the_codes_that_are_missing():
    codes = [len(code) for code in CODES]
    for kept in range(5):
        old, new = CodedState(LAYOUT, (*CODES[:kept], CODES[5])), CodedState(LAYOUT, CODES[:5])
        assert len(encode_delta(old, new)) - sum(codes[kept:5]) < 45


def test_codes_are_added_in_their_order_each_sum_rounded():
    total = np.zeros(LAYOUT.size, np.float32)
    for one in CODES[:3]:
        total += decode_vector(memoryview(one), LAYOUT, "code")
    state = VERSIONS[2]
    np.testing.assert_array_equal(state.offset, total)
    np.testing.assert_array_equal(add_codes(CODES[:3], LAYOUT), total)
    base = np.random.default_rng(1).standard_normal(LAYOUT.size).astype(np.float32)
    np.testing.assert_array_equal(state.parameters(base), base + total)
    np.testing.assert_array_equal(ORIGIN.parameters(base), base)


def test_versions_have_names_of_their_own():
    names = {state.digest() for state in (*VERSIONS, raw(1), raw(2), CodedState(LAYOUT, (*CODES[:1], b"")))}
    assert len(names) == len(VERSIONS) + 3


def test_a_stored_version_is_decoded_when_it_is_needed_and_verified_then(monkeypatch):
    data = pack_state(VERSIONS[2])
    with monkeypatch.context() as patch:
        patch.setattr("edge_client.codec.versions.add_codes", None)
        stored = unpack_state(data, LAYOUT)
        assert stored.digest() == VERSIONS[2].digest()
        encode_delta(stored, VERSIONS[3])
    np.testing.assert_array_equal(stored.offset, VERSIONS[2].offset)
    other = CodedState(LAYOUT, VERSIONS[3].codes, VERSIONS[2].digest())
    with pytest.raises(CodecError, match="its codes lead to"):
        other.parameters(np.zeros(LAYOUT.size, np.float32))


def test_a_version_at_rest_is_the_same_version():
    for state in (*VERSIONS, raw(1)):
        rest = state.at_rest()
        assert rest.digest() == state.digest()
        np.testing.assert_array_equal(
            rest.parameters(np.zeros(LAYOUT.size, np.float32)), state.parameters(np.zeros(LAYOUT.size, np.float32))
        )
    assert "offset" not in VERSIONS[2].at_rest().__dict__


def test_raw_states():
    old, new = raw(1), raw(2)
    for held in (old, ORIGIN, VERSIONS[2]):
        found = apply_delta(held, encode_delta(held, new), LAYOUT)
        assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.parameters(old.values), new.values)
    assert unpack_state(pack_state(new), LAYOUT).digest() == new.digest()
    with pytest.raises(CodecError, match="no delta to a coded version"):
        encode_delta(old, ORIGIN)
    with pytest.raises(CodecError, match="for a coded version"):
        apply_delta(old, encode_delta(ORIGIN, VERSIONS[1]), LAYOUT)


def read_delta(data, old=VERSIONS[3]):
    return apply_delta(old, data, LAYOUT)


def read_state(data):
    state = unpack_state(data, LAYOUT)
    state.parameters(np.zeros(LAYOUT.size, np.float32))
    return state


@pytest.mark.parametrize("new", [VERSIONS[2], raw(2)], ids=["coded", "raw"])
def test_damage_never_passes(new):
    rng = np.random.default_rng(4)
    for data, read in ((encode_delta(VERSIONS[3], new), read_delta), (pack_state(new), read_state)):
        for end in range(0, len(data), max(1, len(data) // 60)):
            with pytest.raises(CodecError):
                read(data[:end])
        with pytest.raises(CodecError):
            read(data + b"\0")
        for _ in range(150):
            bad = bytearray(data)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            # Spare bits may be free to change; then the state must still be the right one, which its digest proves.
            with contextlib.suppress(CodecError):
                found = read(bytes(bad))
                np.testing.assert_array_equal(
                    found.parameters(np.zeros(LAYOUT.size, np.float32)),
                    new.parameters(np.zeros(LAYOUT.size, np.float32)),
                )


def test_a_delta_from_codes_that_are_not_here_is_refused():
    data = encode_delta(VERSIONS[2], VERSIONS[3])
    for held in (ORIGIN, VERSIONS[1], VERSIONS[5], CodedState(LAYOUT, CODES[1:4])):
        with pytest.raises(CodecError, match="continues 2 codes"):
            read_delta(data, held)


@given(st.lists(st.integers(0, 5), max_size=5), st.lists(st.integers(0, 5), max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_two_lists_of_codes(first, second):
    old, new = (CodedState(LAYOUT, tuple(CODES[i] for i in which)) for which in (first, second))
    assert apply_delta(old, encode_delta(old, new), LAYOUT).digest() == new.digest()


def test_bounds():
    with pytest.raises(CodecError, match=f"expected at most {CODES_LIMIT}"):
        CodedState(LAYOUT, (b"",) * (CODES_LIMIT + 1))
    full = CodedState(LAYOUT, (b"",) * CODES_LIMIT)
    assert apply_delta(ORIGIN, encode_delta(ORIGIN, full), LAYOUT).digest() == full.digest()
    with pytest.raises(CodecError, match="expected at most"):
        apply_delta(full, encode_delta(full, full)[:-1] + b"\x01\x00", LAYOUT)
    with pytest.raises(CodecError, match="one layout"):
        encode_delta(CodedState(Layout(LAYOUT.tensors[:1])), ORIGIN)
    with pytest.raises(CodecError, match="base is"):
        ORIGIN.parameters(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        VERSIONS[1].offset[0] = 1
    huge = code(LAYOUT, 1, scale=3e38)
    with pytest.raises(CodecError, match="not finite"):
        add_codes((huge, huge), LAYOUT)
