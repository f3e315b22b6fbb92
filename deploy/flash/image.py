"""A base image: unpacked, looked at, and read as it will be on a card, with a boot partition of its own."""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from deploy.flash.disk import Partition, partitions
from deploy.flash.ext import Ext
from deploy.flash.fat import Fat
from deploy.flash.official import System, inspect
from edge_client.errors import FlashError

CHUNK = 4 << 20
"""Bytes that are read, written and compared at a time."""
Progress = Callable[[int], None]
"""Is told of bytes that were dealt with."""

_MAGICS = {b"\xfd7zXZ\x00": ".xz", b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"PK\x03\x04": ".zip"}


@dataclass(frozen=True)
class Base:
    """A raw image or a whole card, and its two partitions."""

    path: Path
    size: int
    """Bytes."""
    boot: Partition
    root: Partition

    @classmethod
    def of(cls, path: Path) -> "Base":
        """Find the partitions of a raw image or a card.

        Raises:
            FlashError: it cannot be read, is cut off, or has other partitions than a Raspberry Pi's card.
        """
        try:
            with path.open("rb") as disk:
                found = partitions(disk)
                size = disk.seek(0, os.SEEK_END)
        except OSError as error:
            raise FlashError(f"{path}: cannot be read ({error.strerror}); expected an image or a card") from error
        boot = next((one for one in found if one.kind == "fat"), None)
        root = next((one for one in found if one.kind == "linux"), None)
        if boot is None or root is None:
            raise FlashError(
                f"{path} has no {'FAT' if boot is None else 'Linux'} partition; expected the image of a whole card, "
                "such as Raspberry Pi OS Lite's"
            )
        end = max(one.start + one.size for one in found)
        if end > size:
            raise FlashError(f"{path} is cut off: its partitions end at byte {end}, it has {size}; fetch it again")
        return cls(path, size, boot, root)

    def extract_boot(self, target: Path) -> Fat:
        """Copy the boot partition to a file of its own, anew; what an earlier card had in it is gone."""
        with self.path.open("rb") as source, target.open("wb") as file:
            source.seek(self.boot.start)
            left = self.boot.size
            while left:
                data = source.read(min(CHUNK, left))
                if not data:
                    raise FlashError(f"{self.path} is cut off within its boot partition; fetch it again")
                write_sparse(file, data)
                left -= len(data)
            file.truncate(self.boot.size)
        return Fat(target)

    def system(self, boot: Fat) -> System:
        """What is on it.

        Raises:
            FlashError: no system that a client can be put on.
        """
        return inspect(boot, Ext(self.path, self.root.start))

    def chunks(self, boot: Path) -> Iterator[bytes]:
        """The whole card in pieces of `CHUNK` bytes, the last one smaller, with ``boot`` for its boot partition."""
        with self.path.open("rb") as disk, boot.open("rb") as changed:
            for place in range(0, self.size, CHUNK):
                disk.seek(place)
                data = bytearray(disk.read(min(CHUNK, self.size - place)))
                first, last = max(place, self.boot.start), min(place + len(data), self.boot.start + self.boot.size)
                if first < last:
                    changed.seek(first - self.boot.start)
                    data[first - place : last - place] = changed.read(last - first)
                yield bytes(data)


def write_sparse(file: BinaryIO, data: bytes) -> None:
    """Write at the file's end; where all is zero, leave a hole. Truncate the file to its size afterwards."""
    if data.count(0) == len(data):
        file.seek(len(data), os.SEEK_CUR)
    else:
        file.write(data)


def packed(path: Path) -> str:
    """How a file is packed, by its first bytes: ``.xz``, ``.gz``, ``.bz2``, ``.zip``, or nothing."""
    with path.open("rb") as file:
        head = file.read(8)
    return next((suffix for magic, suffix in _MAGICS.items() if head.startswith(magic)), "")


def unpack(path: Path, target: Path, progress: Progress) -> None:
    """Unpack an image; ``progress`` is told of bytes read from ``path``.

    Raises:
        FlashError: it is damaged or cut off, or the disk is full.
    """
    try:
        with path.open("rb") as raw, _opened(raw, packed(path)) as source, target.open("wb") as file:
            told = 0
            while data := source.read(CHUNK):
                write_sparse(file, data)
                # Of a zip file, the end is read first.
                now = raw.tell()
                progress(max(0, now - told))
                told = max(told, now)
            file.truncate(file.tell())
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise FlashError(f"{path} is damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        raise FlashError(f"{path} cannot be unpacked to {target.parent} ({error.strerror or error})") from error


@contextmanager
def _opened(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    if suffix == ".zip":
        with zipfile.ZipFile(raw) as archive:
            names = [name for name in archive.namelist() if name.endswith(".img")]
            if len(names) != 1:
                raise FlashError(f"the zip file holds {len(names)} images; expected one")
            with archive.open(names[0]) as member:
                yield cast("BinaryIO", member)
        return
    openers: dict[str, Callable[[BinaryIO], IO[bytes]]] = {
        ".xz": lambda file: cast("IO[bytes]", lzma.LZMAFile(file)),  # noqa: SIM115 (closed by who asks)
        ".gz": lambda file: cast("IO[bytes]", gzip.GzipFile(fileobj=file)),
        ".bz2": lambda file: cast("IO[bytes]", bz2.BZ2File(file)),
    }
    with openers[suffix](raw) as member:
        yield cast("BinaryIO", member)


def is_device(path: Path) -> bool:
    """Whether a path is a block device, such as a card."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def room_for(folder: Path, size: int) -> None:
    """See that a folder's disk has ``size`` bytes free.

    Raises:
        FlashError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FlashError(f"{folder} has {free >> 20} MiB free, {size >> 20} MiB are needed; name another with --cache")
