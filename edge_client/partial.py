"""A blob on its way, kept in a file chunk by chunk: what has come is not sent again after a crash or a power cut.

The file is a log: a header that names the blob, then its chunks in the order in which they came, each with a checksum.
A torn end is found by its checksum and cut off. Whether the blob is what its name says is known once it is whole.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_client.errors import StoreError
from edge_client.wire.messages import CHUNK_MAX, CHUNK_MIN, BlobRef
from edge_client.wire.transfer import Assembly, Checklist

_MAGIC = b"fedgepart1"
_HEADER = struct.Struct("<10s32sQII")
"""Magic, SHA-256, size, size of a chunk, checksum of what comes before."""
_CHECK = 4
_CHUNK = struct.Struct("<II")
"""Index, checksum of index and data."""
_SYNC = 4 * 2**20
"""Bytes that a power cut may cost."""


class PartialBlob:
    """The file of one blob under way; with ``durable`` it is synchronized every few MiB.

    It is read when the object is made: one file has one of them at a time.
    """

    def __init__(self, path: Path, *, limit: int, durable: bool = True) -> None:
        self._path = path
        self._limit = limit
        self._durable = durable
        self._size = 0
        self._unsynced = 0
        self.checklist: Checklist | None = None
        """Which chunks of which blob are there; None when there is no blob."""
        with self._explained():
            if path.exists():
                self._scan()

    def keep(self, ref: BlobRef, index: int, data: bytes) -> None:
        """Add one chunk; the first one of another blob replaces this one. One that is there already changes nothing.

        Raises:
            StoreError: the disk refuses; what was there before still is.
        """
        with self._explained():
            if self.checklist is None or self.checklist.ref != ref:
                self.discard()
                checklist = Checklist(ref, limit=self._limit)
                self._append(_header(ref))
                self.checklist = checklist
            if not self.checklist.lacks(index) or not self.checklist.fits(index, len(data)):
                return
            self._append(_CHUNK.pack(index, _sum(index, data)) + data)
            self.checklist.mark(index, len(data))

    def assembly(self) -> Assembly | None:
        """What has come, in memory; None when there is no blob.

        Raises:
            StoreError: the disk refuses.
        """
        if self.checklist is None:
            return None
        found = Assembly(self.checklist.ref, limit=self._limit)
        with self._explained(), open(self._path, "rb") as file:
            file.seek(_HEADER.size)
            for index, data in _chunks(file, self.checklist):
                found.add(index, data)
        return found

    def discard(self) -> None:
        """Remove the file; there is no blob any more."""
        self.checklist, self._size, self._unsynced = None, 0, 0
        with self._explained():
            self._path.unlink(missing_ok=True)

    def _append(self, record: bytes) -> None:
        try:
            with open(self._path, "ab") as file:
                file.write(record)
                self._unsynced += len(record)
                if self._durable and self._unsynced >= _SYNC:
                    file.flush()
                    os.fsync(file.fileno())
                    self._unsynced = 0
        except OSError:
            # Half a record would hide all that come after it.
            if self._path.exists():
                os.truncate(self._path, self._size)
            raise
        self._size += len(record)

    def _scan(self) -> None:
        with open(self._path, "rb") as file:
            ref = _named(file.read(_HEADER.size))
            if ref is None or not 0 < ref.size <= self._limit:
                self.discard()
                return
            checklist = Checklist(ref, limit=self._limit)
            self._size = _HEADER.size
            for index, data in _chunks(file, checklist):
                checklist.mark(index, len(data))
                self._size += _CHUNK.size + len(data)
        if self._path.stat().st_size > self._size:
            os.truncate(self._path, self._size)
        self.checklist = checklist

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self._path}: {error.strerror or error}; check the disk's free space and the file's permissions"
            ) from error


def _chunks(file: BinaryIO, checklist: Checklist) -> Iterator[tuple[int, bytes]]:
    """The chunks of a log, up to the first that is torn."""
    ref = checklist.ref
    while len(head := file.read(_CHUNK.size)) == _CHUNK.size:
        index, checksum = _CHUNK.unpack(head)
        data = file.read(max(0, min(ref.chunk, ref.size - index * ref.chunk)))
        if not data or not checklist.fits(index, len(data)) or _sum(index, data) != checksum:
            return
        yield index, data


def _sum(index: int, data: bytes) -> int:
    return zlib.crc32(data, index)


def _header(ref: BlobRef) -> bytes:
    plain = _HEADER.pack(_MAGIC, ref.sha256, ref.size, ref.chunk, 0)[:-_CHECK]
    return plain + struct.pack("<I", zlib.crc32(plain))


def _named(header: bytes) -> BlobRef | None:
    """The blob that a header names; None where it is torn or foreign."""
    if len(header) != _HEADER.size:
        return None
    magic, sha256, size, chunk, checksum = _HEADER.unpack(header)
    if magic != _MAGIC or zlib.crc32(header[:-_CHECK]) != checksum or not CHUNK_MIN <= chunk <= CHUNK_MAX:
        return None
    return BlobRef(sha256, size, chunk)
