import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec import vector as vector_module
from edge_client.codec.blocks import blocks
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.vector import VectorEncoder, decode_block, decode_vector
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import PLANTED, SMALL, planted, small_blocks


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def close(told, residual, vector):
    """What is told and what is left out are the vector, but for the rounding of two additions in float32."""
    highest = float(np.abs(vector.astype(np.float64)).max())
    np.testing.assert_allclose(told.astype(np.float64) + residual, vector, rtol=0, atol=3e-7 * highest + 1e-44)


@pytest.mark.parametrize("multiple", [1e-9, 0.02, 0.5, 2.0, 1e9])
@pytest.mark.parametrize("small", [False, True])
def test_what_is_told_and_what_is_left_are_the_vector(example, multiple, small):
    if not example.vector.any():
        return
    encoder = VectorEncoder(example.vector, example.layout)
    data = encoder.encode(multiple * encoder.rms)
    if small:
        with small_blocks():
            encoder = VectorEncoder(example.vector, example.layout)
            data = encoder.encode(multiple * encoder.rms)
            told = decode_vector(memoryview(data), example.layout, "vector")
    else:
        told = decode_vector(memoryview(data), example.layout, "vector")
    close(told, encoder.residual, example.vector)
    assert float(np.abs(encoder.residual.astype(np.float64)).sum()) < float(
        np.abs(example.vector.astype(np.float64)).sum()
    )


SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=5)


@given(SHAPES, st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-10, 10))
@settings(max_examples=80, deadline=None)
def test_any_layout_round_trips(shapes, seed, fineness, scale):
    layout = Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))
    if not layout.size:
        return
    vector = planted(layout, seed) * np.float32(10**scale)
    encoder = VectorEncoder(vector, layout)
    data = encoder.encode(10**fineness * encoder.rms)
    close(decode_vector(memoryview(data), layout, "vector"), encoder.residual, vector)


def test_noise_is_that_of_the_residual():
    vector = planted(PLANTED, 1)
    encoder = VectorEncoder(vector, PLANTED)
    for multiple in (0.1, 1.0):
        noise = encoder.noise(multiple * encoder.rms)
        residual = encoder.residual.copy()
        encoder.encode(multiple * encoder.rms)
        np.testing.assert_array_equal(encoder.residual, residual)
        assert noise == pytest.approx(float((residual**2).sum() / (vector**2).sum()), rel=1e-3)


def test_what_was_tried_before_changes_nothing_but_the_search_for_directions():
    """Rate control may come to a step from above or below: bytes and residual still belong together."""
    vector = planted(PLANTED, 2)
    for steps in ([2.0, 0.5], [0.1, 0.5], [0.5, 0.5]):
        encoder = VectorEncoder(vector, PLANTED)
        for step in steps:
            data = encoder.encode(step * encoder.rms)
        close(decode_vector(memoryview(data), PLANTED, "vector"), encoder.residual, vector)


@pytest.mark.parametrize("multiple", [0.1, 1.0])
def test_one_block_equals_that_slice_of_the_whole(multiple):
    vector = planted(PLANTED, 3)
    with small_blocks():
        encoder = VectorEncoder(vector, PLANTED)
        data = memoryview(encoder.encode(multiple * encoder.rms))
        whole = decode_vector(data, PLANTED, "vector")
        cut = vector_module.blocks(PLANTED)
        assert len(cut) > 5
        for number, block in enumerate(cut):
            np.testing.assert_array_equal(decode_block(data, PLANTED, number, "vector"), whole[block.where])


def test_reading_one_block_decodes_no_other(monkeypatch):
    vector = planted(PLANTED, 4)
    with small_blocks():
        encoder = VectorEncoder(vector, PLANTED)
        data = encoder.encode(encoder.rms)
        bodies = vector_module._split(memoryview(data), PLANTED, "vector")[1]
        whole = decode_vector(memoryview(data), PLANTED, "vector")
        cut = vector_module.blocks(PLANTED)
        for number in range(len(cut)):
            # Every other block's bytes are nonsense.
            damaged = bytearray(data)
            at = len(data) - sum(map(len, bodies))
            for other, body in enumerate(bodies):
                if other != number:
                    damaged[at : at + len(body)] = b"\xff" * len(body)
                at += len(body)
            found = decode_block(memoryview(damaged), PLANTED, number, "vector")
            np.testing.assert_array_equal(found, whole[cut[number].where])
            if len(cut) > 1:
                with pytest.raises(CodecError):
                    decode_vector(memoryview(damaged), PLANTED, "vector")


def test_small_blocks_cost_little():
    vector = planted(PLANTED, 5)
    one = VectorEncoder(vector, PLANTED)
    one.encode(one.rms)
    with small_blocks():
        several = VectorEncoder(vector, PLANTED)
        several.encode(several.rms)
        assert len(several.data) < len(one.data) + 150 * len(blocks(PLANTED, SMALL))


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf])
def test_steps_that_are_none_are_refused(step):
    vector = planted(PLANTED, 6)
    encoder = VectorEncoder(vector, PLANTED)
    data = bytearray(encoder.encode(encoder.rms))
    data[:4] = np.float32(step).tobytes()
    with pytest.raises(CodecError, match="step"):
        decode_vector(memoryview(data), PLANTED, "vector")


@pytest.mark.parametrize("step", [1e-45, 3.4e38])
def test_steps_of_any_size_decode_without_a_warning(step):
    vector = planted(PLANTED, 7)
    encoder = VectorEncoder(vector, PLANTED)
    data = bytearray(encoder.encode(0.05 * encoder.rms))
    data[:4] = np.float32(step).tobytes()
    assert not np.isnan(decode_vector(memoryview(data), PLANTED, "vector")).any()
