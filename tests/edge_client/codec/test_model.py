"""Versions with buffers and a control: exact deltas, digests that cover them, not a byte more for models without."""

import contextlib

import numpy as np
import pytest

from edge_client.codec.control import coded_control, decode_control, raw_control
from edge_client.codec.integers import varint
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import (
    Model,
    apply_model_delta,
    encode_model_delta,
    pack_model,
    unpack_model,
    untrained,
)
from edge_client.codec.vector import decode_vector
from edge_client.codec.versions import CodedState, RawState, encode_delta, pack_state
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import code, planted

LAYOUT = Layout((TensorSpec("w", (6, 5)), TensorSpec("b", (6,))))
NONE = np.zeros(0, np.float32)


def model(seed, raw=False, buffers=4, control=False):
    rng = np.random.default_rng(seed)
    state = RawState(planted(LAYOUT, seed)) if raw else CodedState(LAYOUT, (code(LAYOUT, 9), code(LAYOUT, seed)))
    told = raw_control(planted(LAYOUT, seed)) if raw else coded_control(code(LAYOUT, seed))
    return Model(state, rng.normal(size=buffers).astype(np.float32), told if control else b"")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("buffers", [0, 1, 7])
@pytest.mark.parametrize("controls", [(False, False), (False, True), (True, True), (True, False)])
def test_a_delta_leads_to_the_same_bits(raw, buffers, controls):
    old, new = (model(seed, raw, buffers, control) for seed, control in zip((1, 2), controls, strict=True))
    found = apply_model_delta(old, encode_model_delta(old, new), LAYOUT)
    assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.buffers, new.buffers)
    assert found.control == new.control
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


@pytest.mark.parametrize("kind", [{}, {"control": True}, {"control": True, "raw": True}], ids=str)
def test_damage_never_passes(kind):
    old, new = model(1), model(2, **kind)
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
                found.control_vector(LAYOUT)
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


def test_a_control_is_float32_or_quantized_and_no_bytes_are_zeros():
    vector = planted(LAYOUT, 3)
    np.testing.assert_array_equal(decode_control(raw_control(vector), LAYOUT), vector)
    told = decode_control(coded_control(code(LAYOUT, 3)), LAYOUT)
    assert told is not None
    np.testing.assert_array_equal(told, decode_vector(memoryview(code(LAYOUT, 3)), LAYOUT, "control"))
    assert raw_control(0 * vector) == coded_control(b"") == b""
    assert decode_control(b"", LAYOUT) is None
    assert model(2).control_vector(LAYOUT) is None


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (b"\x01", "kind 1; expected 2 or 3"),
        (b"\x02" + bytes(4 * LAYOUT.size - 4), "control of 141 bytes; expected 145"),
        (b"\x02" + bytes(4 * LAYOUT.size + 4), "control of 149 bytes; expected 145"),
        (b"\x02" + np.full(LAYOUT.size, np.inf, "<f4").tobytes(), "NaN or infinite"),
        (b"\x03", "cut off"),
        (b"\x03" + code(LAYOUT, 1)[:-1], "fetch it again"),
    ],
)
def test_what_is_no_control_is_refused(control, words):
    with pytest.raises(CodecError, match=words):
        unpack_model(pack_model(Model(model(1).state, NONE, control)), LAYOUT).control_vector(LAYOUT)


def test_a_control_longer_than_any_of_its_layout_is_refused_before_anyone_keeps_it():
    most = 4 * LAYOUT.size + 1025
    for length, refused in ((most, False), (most + 1, True)):
        data = encode_model_delta(model(1), Model(model(2).state, model(2).buffers, b"\x03" + bytes(length - 1)))
        with (
            pytest.raises(CodecError, match=f"{length} bytes; expected at most")
            if refused
            else contextlib.nullcontext()
        ):
            apply_model_delta(model(1), data, LAYOUT)


def test_a_control_takes_part_in_the_digest_and_another_model_s_does_not_pass():
    first, second = model(1, control=True), model(2, control=True)
    assert len({first.digest(), model(1).digest(), Model(first.state, first.buffers, second.control).digest()}) == 3
    inner = pack_model(model(1))
    mixed = b"FV\x01" + varint(len(inner)) + inner + second.control + first.digest()[:16]
    with pytest.raises(CodecError, match="its control is not the one"):
        unpack_model(mixed, LAYOUT)


def test_the_bytes_of_a_control_stay_as_they_are():
    plain = Model(RawState(np.array([0.5, 0, -2], np.float32)), np.array([0.5, -2.0], np.float32))
    new = Model(plain.state, plain.buffers, raw_control(np.array([1, 0, -0.5], np.float32)))
    inner = pack_model(plain)
    control = bytes.fromhex("020000803f00000000000000bf")
    assert pack_model(new) == b"FV\x01" + bytes([len(inner)]) + inner + control + new.digest()[:16]
    assert new.digest().hex() == "96b477414adb3ffbf677dbf0aed4b4d94319fde2aa2ab085cb1ab22958e70962"


def test_a_model_at_rest_is_the_same_model():
    new = model(2, control=True)
    assert new.at_rest().digest() == new.digest()
