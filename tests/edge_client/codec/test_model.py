"""Versions with buffers: exact deltas, digests that cover them, and not a byte more for models without any."""

import contextlib

import numpy as np
import pytest

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import (
    Model,
    apply_model_delta,
    encode_model_delta,
    pack_model,
    unpack_model,
    untrained,
)
from edge_client.codec.versions import CodedState, RawState, encode_delta, pack_state
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import code, planted

LAYOUT = Layout((TensorSpec("w", (6, 5)), TensorSpec("b", (6,))))
NONE = np.zeros(0, np.float32)


def model(seed, raw=False, buffers=4):
    rng = np.random.default_rng(seed)
    state = RawState(planted(LAYOUT, seed)) if raw else CodedState(LAYOUT, (code(LAYOUT, 9), code(LAYOUT, seed)))
    return Model(state, rng.normal(size=buffers).astype(np.float32))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("buffers", [0, 1, 7])
def test_a_delta_leads_to_the_same_bits(raw, buffers):
    old, new = model(1, raw, buffers), model(2, raw, buffers)
    found = apply_model_delta(old, encode_model_delta(old, new), LAYOUT)
    assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.buffers, new.buffers)
    assert unpack_model(pack_model(new), LAYOUT).digest() == new.digest()


def test_from_the_untrained_model_with_the_bundles_buffers():
    first = untrained(LAYOUT, np.ones(4, np.float32))
    new = model(3)
    assert apply_model_delta(first, encode_model_delta(first, new), LAYOUT).digest() == new.digest()
    assert first.digest() != untrained(LAYOUT, np.zeros(4, np.float32)).digest()


def test_without_buffers_the_bytes_are_those_of_the_parameters():
    old, new = model(1, buffers=0), model(2, buffers=0)
    assert new.digest() == new.state.digest()
    assert pack_model(new) == pack_state(new.state)
    assert encode_model_delta(old, new) == encode_delta(old.state, new.state)
    assert untrained(LAYOUT, NONE).digest() == CodedState(LAYOUT).digest()


def test_the_digest_covers_every_buffer():
    new = model(2)
    for place in range(4):
        changed = new.buffers.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9))
        assert Model(new.state, changed).digest() != new.digest()


def test_damage_never_passes():
    old, new = model(1), model(2)
    rng = np.random.default_rng(4)
    for data, read in (
        (encode_model_delta(old, new), lambda found: apply_model_delta(old, found, LAYOUT)),
        (pack_model(new), lambda found: unpack_model(found, LAYOUT)),
    ):
        for end in range(len(data)):
            with pytest.raises(CodecError):
                read(data[:end])
        for more in (b"\0", b"\0\0\0\0"):
            with pytest.raises(CodecError):
                read(data + more)
        for _ in range(300):
            bad = bytearray(data)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(CodecError):
                found = read(bytes(bad))
                found.parameters(np.zeros(LAYOUT.size, np.float32))
                assert found.digest() == new.digest()


def test_another_bundles_delta_is_refused():
    old = model(1)
    data = encode_model_delta(old, model(2))
    with pytest.raises(CodecError, match="4 buffer values; expected 2"):
        apply_model_delta(Model(old.state, old.buffers[:2]), data, LAYOUT)


def test_the_bytes_stay_as_they_are():
    new = Model(RawState(np.array([0.5, 0, -2], np.float32)), np.array([0.5, -2.0], np.float32))
    packed = pack_model(new)
    inner = pack_state(new.state)
    assert packed == b"FB\x01" + bytes([len(inner)]) + inner + bytes.fromhex("0000003f000000c0") + new.digest()[:16]
    assert new.digest().hex() == "be04f1bd48287abc232057e4b055043f3e521c5a7de065f0b9cd26bea58ec11f"


def test_a_model_at_rest_is_the_same_model():
    new = model(2)
    assert new.at_rest().digest() == new.digest()
