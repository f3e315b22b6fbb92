"""From a base image or a card to cards of devices: unpack once, then for each a boot partition of its own."""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.flash import boot, writing
from deploy.flash.image import CHUNK, Base, Progress, is_device, packed, room_for, unpack
from deploy.flash.official import System
from deploy.flash.settings import CardSettings
from edge_client.errors import FlashError

_DAY = 86_400.0
_USUAL = 4 << 30
"""Bytes that an official image of the Lite kind unpacks to at most, about."""


@dataclass(frozen=True)
class Bench:
    """A base that is ready, and what is on it."""

    base: Base
    system: System
    _boot: Path

    @property
    def in_place(self) -> bool:
        """Whether the base is a card itself, of which the boot partition alone is written."""
        return is_device(self.base.path)

    def set_up(self, settings: CardSettings, wheels: Mapping[str, Path], *, now: float) -> None:
        """Make the boot partition that of one device; of a device before it nothing is left, not even in free space.

        Raises:
            FlashError: there is no room for it.
        """
        fat = self.base.extract_boot(self._boot)
        boot.write(fat, self.system, settings, wheels, now=now)

    def to_image(self, path: Path, wrote: Progress, read: Progress) -> None:
        """Write an image file and read it back.

        Raises:
            FlashError: the disk refuses, or holds something else then.
        """
        writing.write_image(path, self.base.chunks(self._boot), wrote)
        writing.verify(path, self.base.chunks(self._boot), read)

    def to_device(self, path: Path, wrote: Progress, read: Progress, *, shared: bool = False) -> None:
        """Write a card and read it back; ``shared`` although the kernel uses it.

        Raises:
            FlashError: the device refuses, or holds something else then.
        """
        writing.write_device(path, self.base.chunks(self._boot), wrote, shared=shared)
        writing.verify(path, self.base.chunks(self._boot), read)

    def to_itself(self, wrote: Progress, read: Progress, *, shared: bool = False) -> None:
        """Write the boot partition back to the card that it came from, and read it back.

        Raises:
            FlashError: the device refuses, or holds something else then.
        """
        path, start = self.base.path, self.base.boot.start
        writing.write_device(path, _pieces(self._boot), wrote, start=start, shared=shared)
        writing.verify(path, _pieces(self._boot), read, start=start)


@contextmanager
def opened(path: Path, cache: Path, progress: Progress) -> Iterator[Bench]:
    """A base, unpacked where it is packed; ``progress`` is told of bytes of ``path`` that were unpacked.

    Raises:
        FlashError: it is none, damaged, or holds a system that a client cannot be put on.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        suffix = "" if is_device(path) else packed(path)
    except OSError as error:
        raise FlashError(f"{error.filename}: {error.strerror}; expected an image, a card, or a URL") from error
    for left in cache.glob("flash-*"):
        # Of a run that was killed; one that is a day old does not run any more.
        if left.stat().st_mtime < time.time() - _DAY:
            shutil.rmtree(left, ignore_errors=True)
    # A boot partition holds a claim: the folder is its owner's alone.
    with tempfile.TemporaryDirectory(prefix="flash-", dir=cache) as name:
        folder = Path(name)
        if suffix:
            room_for(folder, _USUAL if path.stat().st_size > _USUAL >> 4 else path.stat().st_size)
            unpack(path, folder / "base.img", progress)
        base = Base.of(folder / "base.img" if suffix else path)
        fat = base.extract_boot(folder / "boot.img")
        yield Bench(base, base.system(fat), fat.path)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            yield data
