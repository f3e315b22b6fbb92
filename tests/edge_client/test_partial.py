"""Blobs under way on the disk: what was written comes back, whatever a power cut leaves of the file."""

import errno
import os
import random

import pytest

from edge_client import partial
from edge_client.errors import StoreError
from edge_client.partial import PartialBlob
from edge_client.wire.transfer import piece, refer

DATA = random.Random(5).randbytes(10 * 1024 - 100)
REF = refer(DATA, chunk=1024, inline=0)
OTHER = refer(DATA[::-1], chunk=1024, inline=0)
LIMIT = 20_000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "blob.part"


def kept(path, indices, ref=REF, data=DATA):
    blob = PartialBlob(path, limit=LIMIT)
    for index in indices:
        blob.keep(ref, index, piece(data, ref, index))
    return blob


def missing(path):
    found = PartialBlob(path, limit=LIMIT).assembly()
    return None if found is None else found.missing()


def test_what_was_kept_is_there_in_the_next_life(path):
    kept(path, (9, 2, 0))
    blob = kept(path, (4,))
    assert missing(path) == (1, 3, 5, 6, 7, 8)
    for index in (1, 3, 5, 6, 7, 8):
        blob.keep(REF, index, piece(DATA, REF, index))
    assert PartialBlob(path, limit=LIMIT).assembly().take() == DATA


def test_a_chunk_that_is_there_or_does_not_fit_costs_no_space(path):
    blob = kept(path, (0, 1))
    size = path.stat().st_size
    for index, data in ((0, bytes(1024)), (1, piece(DATA, REF, 1)), (2, b"short"), (99, bytes(1024))):
        blob.keep(REF, index, data)
    assert path.stat().st_size == size


def test_another_blob_replaces_the_one_before(path):
    kept(path, (0, 1, 2))
    kept(path, (5,), OTHER, DATA[::-1])
    assert PartialBlob(path, limit=LIMIT).checklist.ref == OTHER
    assert missing(path) == (0, 1, 2, 3, 4, 6, 7, 8, 9)


def test_discarded_is_gone(path):
    kept(path, (0,)).discard()
    assert not path.exists()
    assert missing(path) is None


def test_a_file_cut_anywhere_gives_the_chunks_before_the_cut_and_goes_on(path):
    kept(path, (3, 7, 1))
    whole = path.read_bytes()
    for size in range(0, len(whole) + 1, 37):
        path.write_bytes(whole[:size])
        found = missing(path)
        there = max(0, size - partial._HEADER.size) // (1024 + partial._CHUNK.size)
        if size < partial._HEADER.size:
            assert found is None
        else:
            assert set(range(10)) - set(found) == set((3, 7, 1)[:there])
        kept(path, range(10))
        assert PartialBlob(path, limit=LIMIT).assembly().take() == DATA


def test_a_damaged_byte_costs_what_comes_after_it_and_no_more(path):
    kept(path, (3, 7, 1))
    data = bytearray(path.read_bytes())
    data[partial._HEADER.size + partial._CHUNK.size + 1024 + 500] ^= 1
    path.write_bytes(data)
    assert set(range(10)) - set(missing(path)) == {3}


@pytest.mark.parametrize("data", [b"", b"something else entirely" * 10, bytes(500)], ids=["empty", "foreign", "zeros"])
def test_a_file_of_something_else_counts_as_none(path, data):
    path.write_bytes(data)
    assert missing(path) is None


def test_a_blob_above_the_limit_counts_as_none(path):
    kept(path, (0,))
    assert PartialBlob(path, limit=len(DATA) - 1).checklist is None


def test_a_full_disk_is_an_error_and_what_was_kept_stays(path, monkeypatch):
    blob = kept(path, (0, 1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(partial, "_SYNC", 0)
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device; check the disk's free space"):
            blob.keep(REF, 2, piece(DATA, REF, 2))
    blob.keep(REF, 3, piece(DATA, REF, 3))
    assert set(range(10)) - set(missing(path)) == {0, 1, 3}
