import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec.entropy import activity, decode_levels, encode_levels
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import coarse


def dense(index, level, size):
    vector = np.zeros(size, np.int64)
    assert len(np.unique(index)) == len(index)
    vector[index] = level
    return vector


def zero_order_bits(vector):
    _, count = np.unique(vector, return_counts=True)
    return float(-(count * np.log2(count / vector.size)).sum())


def test_activity_is_half_octaves():
    assert activity(np.array([0, 1, 2, 3, 4, 5, 6, 8, 16])).tolist() == [0, 1, 3, 4, 5, 5, 6, 7, 9]
    for count in range(1, 3000):
        assert activity(count) == (count * count).bit_length()


@pytest.mark.parametrize("step", [0.05, 1.0, 4.0])
def test_round_trip(example, step):
    if not example.vector.any():
        assert encode_levels(np.zeros(0, np.int64), np.zeros(0, np.int32), example.layout) == b"\0"
        return
    found = coarse(example.vector, step)
    data = encode_levels(found.index, found.level, example.layout)
    index, level = decode_levels(data, example.layout)
    size = example.layout.size
    np.testing.assert_array_equal(dense(index, level, size), dense(found.index, found.level, size))


@st.composite
def sparse(draw):
    shapes = draw(st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4))
    layout = Layout(tuple(TensorSpec(str(i), shape) for i, shape in enumerate(shapes)))
    places = draw(st.sets(st.integers(0, layout.size - 1)))
    values = st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-2, 2)
    levels = [draw(values.filter(bool)) for _ in places]
    return layout, np.array(sorted(places), np.int64), np.array(levels, np.int32)


@given(sparse())
@settings(max_examples=80, deadline=None)
def test_any_sparse_vector_round_trips(case):
    layout, index, level = case
    found = decode_levels(encode_levels(index, level, layout), layout)
    np.testing.assert_array_equal(dense(*found, layout.size), dense(index, level, layout.size))


def test_classes_beat_zero_order_entropy():
    rng = np.random.default_rng(5)
    layout = Layout((TensorSpec("w", (256, 800)),))
    activity_of_rows, activity_of_columns = rng.lognormal(0, 1, (256, 1)), rng.lognormal(0, 1, (1, 800))
    vector = (rng.laplace(size=(256, 800)) * activity_of_rows * activity_of_columns).astype(np.float32).ravel()
    found = coarse(vector, 4.0)
    bits = 8 * len(encode_levels(found.index, found.level, layout))
    assert bits < 0.75 * zero_order_bits(dense(found.index, found.level, layout.size))


def test_without_structure_the_classes_cost_nothing():
    vector = np.random.default_rng(3).laplace(size=256 * 400).astype(np.float32)
    layout = Layout((TensorSpec("w", (256, 400)),))
    found = coarse(vector, 4.0)
    bits = 8 * len(encode_levels(found.index, found.level, layout))
    assert bits < 1.05 * zero_order_bits(dense(found.index, found.level, layout.size))


def test_many_tiny_tensors_pay_no_header_each():
    layout = Layout(tuple(TensorSpec(f"bias{i}", (16,)) for i in range(200)))
    vector = np.random.default_rng(4).laplace(size=layout.size).astype(np.float32)
    found = coarse(vector, 4.0)
    bits = 8 * len(encode_levels(found.index, found.level, layout))
    assert bits < zero_order_bits(dense(found.index, found.level, layout.size)) + 200 * 8


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_corruption_decodes_or_raises(seed, flips):
    rng = np.random.default_rng(seed)
    layout = Layout((TensorSpec("w", (30, 40)), TensorSpec("b", (30,))))
    index = np.flatnonzero(rng.random(layout.size) < 0.2)
    data = bytearray(encode_levels(index, rng.choice(np.array([-2, -1, 1], np.int32), len(index)), layout))
    for _ in range(flips):
        data[rng.integers(len(data))] = rng.integers(256)
    try:
        found, level = decode_levels(bytes(data), layout)
    except CodecError:
        return
    assert len(np.unique(found)) == len(found) == len(level)
    assert not len(found) or 0 <= found.min() <= found.max() < layout.size
    assert level.all()


@given(st.binary(max_size=100))
def test_any_bytes_decode_or_raise(data):
    with contextlib.suppress(CodecError):
        decode_levels(data, Layout((TensorSpec("w", (6, 7)), TensorSpec("b", (3,)))))


def test_claimed_counts_are_bounded_by_the_layout():
    with pytest.raises(CodecError, match="above 42"):
        decode_levels(b"\xff\xff\xff\xff\x0f", Layout((TensorSpec("w", (6, 7)),)))
