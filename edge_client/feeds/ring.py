"""A ring of records on a disk: what a device measures is appended, and the oldest goes when there is too much of it.

The ring is a folder of segments, ``0000000001.ring`` and so on, each a magic number and frames: length, CRC-32 and a
MessagePack record. A record is one write, so that whatever ends the writer costs at most the last one; a torn end is
found by its checksum and cut off by who writes next. Several programs may write: each append holds the folder's lock.
"""

import contextlib
import fcntl
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Self

import msgspec
import numpy as np
import numpy.typing as npt

from edge_client.errors import DataError, StoreError

MAGIC = b"fdring1\n"
_HEAD = struct.Struct("<II")
LARGEST = 16 << 20
"""Bytes of the largest record."""
_NAME = re.compile(r"([0-9]{10})\.ring\Z")
_SHARE = 8
"""Segments of a full ring: an eighth of it goes at a time."""


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """An array: its dtype as numpy writes it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Some fields of the sample ``id``; later ones of the same id add to it, say a label."""

    id: str | int
    time: float
    fields: dict[str, int | float | Packed]


_DECODER = msgspec.msgpack.Decoder(Record)


class Recorder:
    """Appends to the ring in ``folder``.

    Args:
        folder: made where it is not there.
        limit: bytes that the ring may have.
        sync: seconds of records that a power cut may cost; 0 synchronizes each one, which wears an SD card.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        limit: int = 64 << 20,
        sync: float = 5.0,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._limit, self._sync = Path(folder), limit, sync
        self._segment = max(limit // _SHARE, 4096)
        self._wall, self._clock = wall, clock
        self._next = secrets.randbits(48)
        self._path: Path | None = None
        self._file: int | None = None
        self._end = 0
        self._synced = clock()
        with _explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, fields: Mapping[str, object], *, id: str | int | None = None) -> str | int:  # noqa: A002
        """Append a sample, or more fields of one that is there (its label, when it is known); the sample's id.

        ``fields``: numbers and arrays of numbers, by feature name; or, for a bundle of one input, its columns in order
        and the targets by name, as in a CSV file.

        Raises:
            DataError: a field is no number and no array of numbers, or the record is too large.
            StoreError: the disk refuses; what was recorded before still is.
        """
        if id is None:
            self._next += 1
            id = self._next  # noqa: A001
        data = msgspec.msgpack.encode(Record(id, self._wall(), {name: _packed(name, v) for name, v in fields.items()}))
        if not fields or len(data) > min(LARGEST, self._segment - len(MAGIC) - _HEAD.size):
            raise DataError(
                f"a record of {len(fields)} fields and {len(data)} bytes; expected 1 field or more, "
                f"and at most {self._segment} bytes: raise the ring's limit"
            )
        with _explained(self._folder), self._locked():
            self._append(_HEAD.pack(len(data), zlib.crc32(data)) + data)
        return id

    def close(self) -> None:
        """Synchronize what was recorded and let go."""
        if self._file is not None:
            with _explained(self._folder):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _append(self, frame: bytes) -> None:
        file = self._tail(len(frame))
        try:
            if os.write(file, frame) < len(frame):
                raise OSError(28, "No space left on device")
        except OSError:
            os.ftruncate(file, self._end)
            raise
        self._end += len(frame)
        if self._clock() - self._synced >= self._sync:
            os.fsync(file)
            self._synced = self._clock()

    def _tail(self, room: int) -> int:
        """The newest segment, open, cut behind its last sound record, with room for one more."""
        found = segments(self._folder)
        newest = found[-1] if found else None
        if self._file is None or newest != self._path:
            self._open(newest or _path(self._folder, 1))
        elif os.fstat(self._file).st_size != self._end:
            self._cut()  # another program has written, or was ended while it did
        if self._end + room > self._segment and self._end > len(MAGIC):
            assert self._path is not None
            self._open(_path(self._folder, number(self._path) + 1))
            self._shrink()
        assert self._file is not None
        return self._file

    def _open(self, path: Path) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o664)
        self._path, self._end = path, 0
        self._cut()

    def _cut(self) -> None:
        assert self._file is not None
        assert self._path is not None
        with open(self._path, "rb") as file:
            self._end = max((end for _, end in frames(file, self._end)), default=self._end)
        if not self._end:
            os.ftruncate(self._file, 0)
            os.write(self._file, MAGIC)
            self._end = len(MAGIC)
        os.ftruncate(self._file, self._end)

    def _shrink(self) -> None:
        found = segments(self._folder)
        sizes = {path: path.stat().st_size for path in found}
        left = sum(sizes.values()) + self._segment
        for path in found[:-1]:
            if left <= self._limit:
                break
            path.unlink()
            left -= sizes[path]


def segments(folder: Path) -> list[Path]:
    """The ring's segments, the oldest first; none where there is no ring."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if _NAME.match(entry.name))
    except FileNotFoundError:
        return []


def number(path: Path) -> int:
    """A segment's number."""
    return int(path.name[:10])


def frames(file: BinaryIO, start: int) -> Iterator[tuple[bytes, int]]:
    """The sound records of a segment as bytes, each with the offset of its end, from offset ``start`` on.

    0 is the segment's beginning; they end at what is torn, or still being written.
    """
    end = start
    file.seek(start)
    if not start:
        if file.read(len(MAGIC)) != MAGIC:
            return
        end = len(MAGIC)
        yield b"", end
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, checksum = _HEAD.unpack(head)
        if length > LARGEST:
            return
        data = file.read(length)
        if len(data) < length or zlib.crc32(data) != checksum:
            return
        end += _HEAD.size + length
        yield data, end


def decode(data: bytes) -> Record | None:
    """A frame's record; None for the segment's own first frame, and for one of a newer fedge."""
    try:
        return _DECODER.decode(data) if data else None
    except msgspec.DecodeError:
        return None


def _path(folder: Path, of: int) -> Path:
    return folder / f"{of:010d}.ring"


def _packed(name: str, value: object) -> int | float | Packed:
    if isinstance(value, bool | int | float):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"field {name!r}: {error}; expected a number or an array of numbers") from error
    if array.dtype.kind not in "biuf" or not array.size:
        raise DataError(f"field {name!r} is {array.dtype} {list(array.shape)}; expected a number or numbers")
    return Packed(_least(array).dtype.str, array.shape, _least(array).tobytes())


def _least(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """As small as its values allow: what comes from text is 64 bits wide, and models are not."""
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype == np.int64:
        return array.astype(np.promote_types(np.min_scalar_type(array.min()), np.min_scalar_type(array.max())))
    return array


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"ring {folder}: {error.strerror or error}; check the disk's free space and the folder's permissions"
        ) from error
