import contextlib
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec import vector as vector_module
from edge_client.codec.blocks import blocks
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.update import (
    CodecSettings,
    UpdateReader,
    decode_scalars,
    decode_update,
    encode_update,
    max_update_bytes,
)
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import PLANTED, SMALL, examples, planted, small_blocks

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


CLUSTERED = encode(examples()[0]).data


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_corruption_decodes_or_raises(conv, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(CLUSTERED)
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


def spent(encoded, vector, target):
    """What a target is about: bits a parameter, bytes, or the residual's share of the vector's energy."""
    if target == "nmse":
        return float((encoded.residual.astype(np.float64) ** 2).sum() / (vector.astype(np.float64) ** 2).sum())
    return len(encoded.data) * (8 / vector.size if target == "bits" else 1)


LARGE = Layout(
    (
        TensorSpec("a", (400, 500)),
        TensorSpec("conv", (64, 32, 5, 5)),
        TensorSpec("b", (400,)),
        TensorSpec("c", (80, 50)),
    )
)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("target", "value"),
    [
        *(("bits", value) for value in (0.05, 0.1, 0.3, 1.0, 2.0, 4.0)),
        *(("nmse", value) for value in (0.8, 0.5, 0.1, 0.01, 1e-4)),
        *(("bytes", value) for value in (3000, 20_000, 100_000)),
    ],
)
def test_rate_control_hits_its_target_on_large_vectors(rank, target, value):
    vector = planted(LARGE, 1, rank)
    chosen = CodecSettings(target=target, value=value)
    encoded = encode_update({"delta": vector}, {"delta": LARGE}, {"samples": 60}, chosen)
    assert spent(encoded, vector, target) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("target", ["bits", "nmse", "bytes"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_rate_control_hits_what_can_be_reached_on_small_vectors(example, target, share):
    """Between the coarsest and a very fine code, on a logarithmic scale."""
    vectors, layouts = one(example)
    if example.vector.size < 1000 or not example.vector.any() or example.name in ("constant", "spike"):
        return  # a code of a few bytes has no finer steps
    ends = [
        spent(encode_update(vectors, layouts, {}, CodecSettings(target="step", value=step)), example.vector, target)
        for step in (8.0, 0.01)
    ]
    goal = ends[0] ** (1 - share) * ends[1] ** share
    encoded = encode_update(vectors, layouts, {}, CodecSettings(target=target, value=goal))
    # Ten bytes are a value or two.
    few = {"bits": 80 / example.vector.size, "bytes": 10, "nmse": 0}[target]
    assert spent(encoded, example.vector, target) == pytest.approx(goal, rel=0.05, abs=few)


@pytest.mark.parametrize("multiple", [0.05, 1.0, 6.0])
def test_a_step_in_units_of_parameters_is_the_one_that_is_used(example, multiple):
    vectors, layouts = one(example)
    if not example.vector.any():
        return
    size = float(np.sqrt(np.mean(example.vector.astype(np.float64) ** 2)))
    step = multiple * size
    if step > min(np.abs(example.vector).max(), 1e12):
        return  # in root mean squares it would be taken into the vector's bounds
    absolute = encode_update(vectors, layouts, {}, CodecSettings(target="absolute", value=step))
    relative = encode_update(vectors, layouts, {}, CodecSettings(target="step", value=multiple))
    assert len(absolute.data) == pytest.approx(len(relative.data), rel=0.02, abs=4)
    difference = np.abs(absolute.residual - relative.residual)
    assert difference.max() <= 0.01 * step or np.count_nonzero(difference > 0.01 * step) < 0.001 * difference.size


@pytest.mark.parametrize("step", [1.0, 1e12])
def test_far_below_an_absolute_step_nothing_is_told_and_all_of_it_left(step):
    for vector in (planted(LARGE, 3, 4) * np.float32(1e-4), np.full(LARGE.size, 1e-40, np.float32)):
        encoded = encode_update({"delta": vector}, {"delta": LARGE}, {}, CodecSettings(target="absolute", value=step))
        assert len(encoded.data) < 60
        assert not decode_update(encoded.data, {"delta": LARGE}).vectors["delta"].any()
        np.testing.assert_array_equal(encoded.residual, vector)


def test_what_is_left_passes_an_absolute_step_in_the_end(conv):
    """Clients that weigh little say nothing for a while; then all that they have learned."""
    delta, layouts = conv.vector, {"delta": conv.layout}
    step = 3.0 * float(np.abs(delta).max())
    residual, told, sizes = np.zeros_like(delta), np.zeros_like(delta), []
    for _ in range(20):
        encoded = encode_update({"delta": delta + residual}, layouts, {}, CodecSettings(target="absolute", value=step))
        told += decode_update(encoded.data, layouts).vectors["delta"]
        residual = encoded.residual
        sizes.append(len(encoded.data))
    assert min(sizes[1:]) < 60 < max(sizes)
    np.testing.assert_allclose(told + residual, 20 * delta, atol=1e-4 * np.abs(20 * delta).max())
    assert np.abs(residual).max() < step


def test_vectors_that_travel_raw_take_nothing_from_the_bits(conv):
    """Buffers and control variates are no reason to tell the model's update more coarsely; bytes are of the whole."""
    raw = planted(LARGE, 2)
    layouts = {"delta": conv.layout, "control": LARGE}
    sent = {"delta": conv.vector, "control": raw}
    encoded = encode_update(sent, layouts, {}, CodecSettings(target="bits", value=1.0))
    assert (len(encoded.data) - 4 * raw.size) * 8 / conv.vector.size == pytest.approx(1, rel=0.05)
    total = 4 * raw.size + 3000
    encoded = encode_update(sent, layouts, {}, CodecSettings(target="bytes", value=total))
    assert len(encoded.data) == pytest.approx(total, abs=150)


def test_bytes_out_of_reach_end_at_what_is_nearest(conv):
    vectors, layouts = one(conv)
    least = encode_update(vectors, layouts, {}, CodecSettings(target="bytes", value=1)).data
    assert len(least) < 100
    most = encode_update(vectors, layouts, {}, CodecSettings(target="bytes", value=2.0**34))
    assert len(most.data) > 1.2 * conv.vector.size
    assert np.abs(most.residual).max() < 1e-4 * np.abs(conv.vector).max()


def test_many_tiny_tensors_pay_no_header_each():
    layout = Layout(tuple(TensorSpec(f"lora{i}", (4, 4) if i % 2 else (16,)) for i in range(200)))
    vector = planted(layout, 1)
    nothing = encode_update({"delta": np.zeros_like(vector)}, {"delta": layout}, {}, CodecSettings()).data
    assert len(nothing) < 32
    little = encode_update({"delta": vector}, {"delta": layout}, {}, CodecSettings(target="bits", value=0.1)).data
    assert len(little) < 0.1 * layout.size / 8 + 60


def test_adapters_cost_no_more_than_one_matrix_of_their_size():
    many = Layout(tuple(TensorSpec(f"lora{i}", (4, 300)) for i in range(40)))
    one_matrix = Layout((TensorSpec("w", (160, 300)),))
    vector = np.random.default_rng(1).laplace(size=many.size).astype(np.float32)
    sent = CodecSettings(target="step", value=2.0)
    sizes = [len(encode_update({"delta": vector}, {"delta": layout}, {}, sent).data) for layout in (many, one_matrix)]
    assert sizes[0] < 1.05 * sizes[1] + 200


@pytest.fixture
def several():
    """Layouts, vectors and bytes of an update with every kind of vector, in small blocks."""
    layouts = dict.fromkeys(("delta", "control", "zero", "lost"), PLANTED)
    vectors = {name: planted(PLANTED, number) for number, name in enumerate(layouts)}
    vectors["zero"][:] = 0
    vectors["lost"][5] = math.inf
    with small_blocks():
        yield layouts, vectors, encode_update(vectors, layouts, {"samples": 3}, CodecSettings()).data


def test_blocks_are_those_slices_of_the_whole(several):
    layouts, vectors, data = several
    reader = UpdateReader(data, layouts)
    assert reader.scalars == {"samples": 3}
    whole = decode_update(data, layouts).vectors
    np.testing.assert_array_equal(whole["control"], vectors["control"])
    cut = blocks(PLANTED, SMALL)
    for name in layouts:
        np.testing.assert_array_equal(reader.vector(name), whole[name])
        for number, block in enumerate(cut):
            np.testing.assert_array_equal(reader.block(name, number), whole[name][block.where])


def test_reading_a_block_decodes_only_that(several, monkeypatch):
    layouts, _, data = several
    decoded = []
    original = vector_module._decode_block

    def spy(data, block, step, out, what):
        decoded.append(block.start)
        original(data, block, step, out, what)

    monkeypatch.setattr(vector_module, "_decode_block", spy)
    reader = UpdateReader(data, layouts)
    reader.block("control", 0)
    assert decoded == []
    found = reader.block("delta", 2)
    cut = blocks(PLANTED, SMALL)
    assert decoded == [cut[2].start]
    assert found.shape == (cut[2].layout.size,)


def test_readers_refuse_what_decoding_refuses(several, logistic):
    layouts, _, data = several
    with pytest.raises(CodecError, match="another bundle"):
        UpdateReader(data, {**layouts, "delta": logistic.layout})
    with pytest.raises(CodecError, match="cut off"):
        UpdateReader(data[:-1], layouts)
    with pytest.raises(CodecError, match="too many"):
        UpdateReader(data + b"\0", layouts)
