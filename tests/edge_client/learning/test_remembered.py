"""Vectors in a device's store: what goes in comes out, and nothing else does."""

import numpy as np
import pytest

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError
from edge_client.learning.remembered import pack_vector, unpack_vector

LAYOUT = Layout((TensorSpec("w", (2, 3)), TensorSpec("b", (4,))))
VECTOR = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)


def test_a_vector_comes_back_bit_for_bit_in_memory_of_its_own():
    found = unpack_vector(pack_vector(VECTOR, LAYOUT), LAYOUT)
    np.testing.assert_array_equal(found, VECTOR)
    assert found.flags.writeable


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_remembered(value):
    broken = VECTOR.copy()
    broken[3] = value
    with pytest.raises(CodecError, match="NaN or infinite"):
        pack_vector(broken, LAYOUT)


def test_bytes_of_another_layout_are_refused():
    other = Layout((TensorSpec("w", (3, 2)), TensorSpec("b", (4,))))
    with pytest.raises(CodecError, match="another layout"):
        unpack_vector(pack_vector(VECTOR, other), LAYOUT)


def test_damaged_bytes_are_refused():
    data = pack_vector(VECTOR, LAYOUT)
    for cut in range(len(data)):
        with pytest.raises(CodecError):
            unpack_vector(data[:cut], LAYOUT)
    with pytest.raises(CodecError):
        unpack_vector(data + b"x", LAYOUT)
    with pytest.raises(CodecError, match="version 9"):
        unpack_vector(b"\x09" + data[1:], LAYOUT)
    with pytest.raises(CodecError, match="NaN or infinite"):
        unpack_vector(data[:-4] + np.float32(np.nan).tobytes(), LAYOUT)
