"""Blobs in chunks: any order, any repetition; only the bytes that were named come out."""

import random
import tracemalloc

import pytest

from edge_client.errors import WireError
from edge_client.wire.messages import INLINE_LIMIT, BlobRef
from edge_client.wire.transfer import Assembly, count, piece, refer, unwrap

DATA = random.Random(3).randbytes(10_000)
SIZES = [1, 1023, 1024, 1025, 2048, 9_999]


def chunked(data=DATA, chunk=1024):
    return refer(data, chunk=chunk, inline=0)


@pytest.mark.parametrize("size", SIZES)
def test_pieces_in_any_order_and_twice_make_the_blob(size):
    ref = chunked(DATA[:size])
    order = [*range(count(ref))] * 2
    random.Random(size).shuffle(order)
    assembly, seen = Assembly(ref, limit=size), set()
    for index in order:
        assert assembly.add(index, piece(DATA[:size], ref, index)) is (index not in seen)
        seen.add(index)
        assert assembly.missing() == tuple(sorted(set(range(count(ref))) - seen))
        assert assembly.complete is (len(seen) == count(ref))
    assert assembly.take() == DATA[:size]


@pytest.mark.parametrize("size", [0, 1, INLINE_LIMIT])
def test_a_small_blob_travels_within_its_reference(size):
    data = bytes(size)
    ref = refer(data, chunk=1024, inline=10**9)
    assert ref.inline == data
    assert unwrap(ref) == data


def test_a_larger_one_does_not():
    ref = refer(bytes(INLINE_LIMIT + 1), chunk=1024, inline=10**9)
    assert ref.inline is None
    assert unwrap(ref) is None
    assert refer(b"ab", chunk=1024, inline=1).inline is None


@pytest.mark.parametrize("change", [{"inline": b"abd"}, {"size": 4}, {"sha256": bytes(32)}])
def test_inline_bytes_that_are_not_those_named_are_refused(change):
    ref = refer(b"abc", chunk=1024)
    fields = {"sha256": ref.sha256, "size": ref.size, "chunk": ref.chunk, "inline": ref.inline} | change
    with pytest.raises(WireError, match="were named"):
        unwrap(BlobRef(**fields))


def test_pieces_of_a_wrong_length_or_place_are_not_taken():
    ref = chunked(DATA[:2050])
    assembly = Assembly(ref, limit=2050)
    wrong = [(0, b""), (0, DATA[:1023]), (0, DATA[:1025]), (2, DATA[:1024]), (2, b"1"), (3, b"12"), (-1, DATA[:1024])]
    assert not any(assembly.add(index, data) for index, data in wrong)
    assert assembly.missing() == (0, 1, 2)
    assert assembly.missing(2) == (0, 1)
    with pytest.raises(WireError, match="3 of 3 chunks missing"):
        assembly.take()
    assert piece(DATA[:2050], ref, 3) == b""


def test_nothing_is_allocated_for_a_blob_that_is_too_large():
    ref = BlobRef(bytes(32), 2**40, 1024)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=rf"{2**40} bytes; 1 to 1000 are accepted"):
            Assembly(ref, limit=1000)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_an_empty_blob_never_travels_in_chunks():
    with pytest.raises(WireError, match="blob of 0 bytes"):
        Assembly(BlobRef(bytes(32), 0, 1024), limit=1000)


def test_a_blob_of_other_bytes_is_refused_and_can_be_started_again():
    ref = chunked(DATA[:1500])
    assembly = Assembly(ref, limit=1500)
    assembly.add(0, bytes(1024))
    assembly.add(1, piece(DATA[:1500], ref, 1))
    with pytest.raises(WireError, match="SHA-256"):
        assembly.take()
    assembly.restart()
    assert assembly.missing() == (0, 1)
    assert all(assembly.add(index, piece(DATA[:1500], ref, index)) for index in (1, 0))
    assert assembly.take() == DATA[:1500]
