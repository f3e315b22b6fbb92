import contextlib
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.update import CodecSettings, decode_scalars, decode_update, encode_update, max_update_bytes
from edge_client.errors import CodecError

SCALARS = {"samples": 600, "loss": 0.25, "bad": math.inf, "negative": -3.0, "zero": -0.0}


def one(example):
    return {"delta": example.vector}, {"delta": example.layout}


def encode(example, **options):
    vectors, layouts = one(example)
    return encode_update(vectors, layouts, SCALARS, CodecSettings(**options))


@pytest.mark.parametrize("kind", ["quantized", "none"])
def test_round_trip(example, kind):
    encoded = encode(example, kind=kind)
    _, layouts = one(example)
    decoded = decode_update(encoded.data, layouts)
    assert decoded.scalars == SCALARS
    assert math.copysign(1, decoded.scalars["zero"]) == -1
    assert decode_scalars(encoded.data) == SCALARS
    assert len(encoded.data) <= max_update_bytes(layouts)
    told = decoded.vectors["delta"].astype(np.float64)
    rounding = 2e-7 * float(np.abs(example.vector).max(initial=0)) + 1e-44
    np.testing.assert_allclose(told + encoded.residual, example.vector, rtol=0, atol=rounding)
    if kind == "none":
        np.testing.assert_array_equal(decoded.vectors["delta"], example.vector)
        assert not encoded.residual.any()


def test_truncation(example):
    encoded = encode(example)
    _, layouts = one(example)
    for end in range(0, len(encoded.data), max(1, len(encoded.data) // 60)):
        with pytest.raises(CodecError):
            decode_update(encoded.data[:end], layouts)
    with pytest.raises(CodecError):
        decode_update(encoded.data + b"\0", layouts)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_corruption_decodes_or_raises(conv, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encode(conv).data)
    for _ in range(int(rng.integers(1, 5))):
        data[rng.integers(len(data))] = rng.integers(256)
    with contextlib.suppress(CodecError):
        assert decode_update(bytes(data), {"delta": conv.layout}).vectors["delta"].shape == conv.vector.shape


def test_zero_costs_a_few_bytes(conv):
    data = encode_update({"delta": np.zeros_like(conv.vector)}, {"delta": conv.layout}, {}, CodecSettings()).data
    assert len(data) < 30


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_marked(conv, bad):
    vector = conv.vector.copy()
    vector[77] = bad
    encoded = encode_update({"delta": vector}, {"delta": conv.layout}, {}, CodecSettings())
    assert len(encoded.data) < 30
    assert not encoded.residual.any()
    assert np.isnan(decode_update(encoded.data, {"delta": conv.layout}).vectors["delta"]).all()


def test_other_vectors_travel_raw(conv):
    buffers = np.array([1.5, -2.25, 1e-7], np.float32)
    layouts = {"delta": conv.layout, "buffers": Layout((TensorSpec("mean", (3,)),))}
    encoded = encode_update({"delta": conv.vector, "buffers": buffers}, layouts, {}, CodecSettings())
    np.testing.assert_array_equal(decode_update(encoded.data, layouts).vectors["buffers"], buffers)


def test_feedback_loses_nothing(conv):
    rng = np.random.default_rng(11)
    residual = np.zeros_like(conv.vector)
    given_sum, told = np.zeros(residual.size), np.zeros(residual.size)
    for _ in range(12):
        delta = conv.vector * rng.uniform(-1, 1, residual.size).astype(np.float32)
        given_sum += delta
        layouts = {"delta": conv.layout}
        encoded = encode_update({"delta": delta + residual}, layouts, {}, CodecSettings())
        told += decode_update(encoded.data, layouts).vectors["delta"]
        residual = encoded.residual
    np.testing.assert_allclose(told + residual, given_sum, atol=1e-6 * float(np.abs(given_sum).max()) + 1e-8)


def test_small_models_pay_little(logistic):
    vectors, layouts = one(logistic)
    data = encode_update(vectors, layouts, {"samples": 600}, CodecSettings()).data
    assert len(data) * 8 < 0.4 * logistic.layout.size


def test_mismatches(conv, logistic):
    vectors, layouts = one(conv)
    data = encode(conv).data
    with pytest.raises(CodecError, match="another bundle"):
        decode_update(data, {"delta": logistic.layout})
    with pytest.raises(CodecError, match="delta"):
        decode_update(data, {"other": conv.layout})
    with pytest.raises(CodecError, match="expected"):
        encode_update(vectors, {}, {}, CodecSettings())
    with pytest.raises(CodecError, match="float32"):
        encode_update({"delta": conv.vector[:-1]}, layouts, {}, CodecSettings())
    with pytest.raises(CodecError, match="not an update"):
        decode_scalars(b"XX" + data[2:])
    with pytest.raises(CodecError, match="version 3"):
        decode_scalars(b"FU\x03" + data[3:])
    with pytest.raises(CodecError, match="header"):
        encode_update(vectors, layouts, {f"s{i}": 0.1 for i in range(300)}, CodecSettings())


@pytest.mark.parametrize(
    "options",
    [{"value": 0}, {"value": 33.0}, {"target": "nmse", "value": 1.0}, {"target": "x"}, {"kind": "x"}, {"extra": 1}],
)
def test_settings_are_bounded(options):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, CodecSettings)
