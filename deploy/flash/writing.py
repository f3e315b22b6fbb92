"""Writes a card or an image and reads it back, past the caches."""

import contextlib
import fcntl
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from deploy.flash.image import CHUNK, Progress, write_sparse
from edge_client.errors import FlashError

_REREAD_PARTITIONS = 0x125F
"""BLKRRPART of linux/fs.h."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def write_image(path: Path, chunks: Iterable[bytes], progress: Progress) -> None:
    """Write an image file; what is zero takes no space. A file of that name is replaced when the new one is whole.

    Raises:
        FlashError: the disk refuses.
    """
    new = path.with_name(f".{path.name}.part")
    try:
        with new.open("wb") as file:
            # It holds a claim.
            os.fchmod(file.fileno(), 0o600)
            size = 0
            for data in chunks:
                write_sparse(file, data)
                size += len(data)
                progress(len(data))
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise FlashError(f"{path} cannot be written ({error.strerror}); is the disk full?") from error
    finally:
        new.unlink(missing_ok=True)


def write_device(path: Path, chunks: Iterable[bytes], progress: Progress, *, start: int = 0, shared: bool) -> None:
    """Write to a device from byte ``start`` on; zeros too, as what was there before is not zero.

    What comes first is written last: a card that was pulled out meanwhile has no partition table, and does not boot.
    ``shared`` writes although the kernel uses it.

    Raises:
        FlashError: the device refuses.
    """
    try:
        with _open(path, os.O_WRONLY | (0 if shared else os.O_EXCL)) as descriptor:
            first, place = b"", start
            for data in chunks:
                if place == start:
                    first = data
                    os.pwrite(descriptor, bytes(len(data)), place)
                else:
                    _write(descriptor, data, place)
                place += len(data)
                progress(len(data))
            os.fsync(descriptor)
            _write(descriptor, first, start)
            os.fsync(descriptor)
            # No partition is in use, or the kernel goes on with the old table until the card is put in again.
            with contextlib.suppress(OSError):
                fcntl.ioctl(descriptor, _REREAD_PARTITIONS)
    except OSError as error:
        raise FlashError(f"{path} cannot be written ({error.strerror}); {_hint(error)}") from error


def verify(path: Path, chunks: Iterable[bytes], progress: Progress, *, start: int = 0) -> None:
    """Read a device or a file back from byte ``start`` on, from the medium itself, and compare.

    Raises:
        FlashError: it holds something else than was written.
    """
    try:
        with _open(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
            if sys.platform == "linux":
                # What is still in memory would be compared with itself.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            with _reading(path, descriptor) as source, mmap.mmap(-1, CHUNK) as buffer:
                place = start
                for data in chunks:
                    found = _read(source, buffer, len(data), place)
                    if found != data:
                        at = next((n for n, byte in enumerate(found) if byte != data[n]), len(found))
                        raise FlashError(
                            f"{path} was written and reads back otherwise at byte {place + at}: it is worn out, "
                            "smaller than its label says, or was pulled out; take another card"
                        )
                    place += len(data)
                    progress(len(data))
    except OSError as error:
        raise FlashError(f"{path} cannot be read back ({error.strerror}); {_hint(error)}") from error


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reading(path: Path, descriptor: int) -> Iterator[int]:
    """A descriptor that reads from the medium where the file system can, else the one that is given."""
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
    except OSError:
        yield descriptor
        return
    try:
        yield direct
    finally:
        os.close(direct)


def _read(descriptor: int, buffer: mmap.mmap, count: int, place: int) -> bytes:
    """Read into a buffer of whole pages, which reading past the cache asks for."""
    done = 0
    while done < count:
        with memoryview(buffer) as view, view[done:] as rest:
            got = os.preadv(descriptor, [rest], place + done)
        if got == 0:
            break
        done += got
    return buffer[: min(done, count)]


def _write(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, place)
        view, place = view[done:], place + done


def _hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "run it as root, or as a member of the group disk"
    return "is it still in its reader, and not in use?"
