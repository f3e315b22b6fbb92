import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.codec.integers import CONSTANT, PCODEC, RICE_COUNT, Reader, pack, section, unpack, varint
from edge_client.errors import CodecError

LISTS = {
    "none": [],
    "one": [5],
    "same": [3] * 10_000,
    "large": [2**32 - 1, 0],
    "outlier": [0] * 50 + [2**32 - 1],
    "short": [1, 0, 2, 0, 0, 7, 1],
    "ramp": list(range(RICE_COUNT)),
    "long": [i * i % 17 for i in range(RICE_COUNT + 1)],
}


@pytest.mark.parametrize("values", LISTS.values(), ids=LISTS)
def test_round_trip_and_every_prefix(values):
    array = np.array(values, np.uint32)
    data = pack(array)
    np.testing.assert_array_equal(unpack(memoryview(data), len(array), "list"), array)
    for end in range(0, len(data), max(1, len(data) // 50)):
        with pytest.raises(CodecError):
            unpack(memoryview(data[:end]), len(array), "list")


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=200))
def test_any_list_round_trips(values):
    array = np.array(values, np.uint32)
    np.testing.assert_array_equal(unpack(memoryview(pack(array)), len(array), "list"), array)


@given(st.binary(max_size=60), st.integers(0, 50))
def test_any_bytes_decode_or_raise(data, count):
    with contextlib.suppress(CodecError):
        assert unpack(memoryview(data), count, "list").shape == (count,)


def test_short_lists_pay_no_pcodec_header():
    gaps = np.random.default_rng(0).geometric(0.02, 150).astype(np.uint32)
    entropy = 150 * 7.07 / 8
    assert len(pack(gaps)) < 1.05 * entropy + 2


def test_golomb_rice_bytes_are_pinned():
    # k = 1: quotients 0 1 0 2 -> 1 01 1 001, remainders 1 0 0 1 -> 1011 0011 0010 0000 without the last five
    assert pack(np.array([1, 2, 0, 5], np.uint32)).hex() == "01b320"


def test_constants_take_three_bytes():
    assert pack(np.full(10**6, 300, np.uint32)) == bytes([CONSTANT]) + varint(300)


def test_a_long_list_is_not_unpacked_from_golomb_rice():
    with pytest.raises(CodecError, match="coder 0"):
        unpack(memoryview(b"\0" + b"\xff" * 1000), RICE_COUNT + 1, "list")


def test_pcodec_file_of_another_length_is_refused():
    data = memoryview(pack(np.arange(5000, dtype=np.uint32)))
    assert data[0] == PCODEC
    for count in (4999, 5001):
        with pytest.raises(CodecError):
            unpack(data, count, "list")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16384, 2**31, 2**35 - 1])
def test_varints(value):
    assert Reader(varint(value), "x").varint(2**35) == value


def test_reader_bounds():
    with pytest.raises(CodecError, match="above 5"):
        Reader(varint(6), "x").varint(5)
    with pytest.raises(CodecError, match="cut off"):
        Reader(section(b"abc")[:-1] + b"", "x").take(9)
    with pytest.raises(CodecError):
        Reader(b"\xff" * 9, "x").varint(2**40)
    with pytest.raises(CodecError, match="too many"):
        Reader(b"a", "x").end()
