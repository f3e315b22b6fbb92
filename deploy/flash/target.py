"""Block devices: which may be written, as sysfs and the kernel's tables of mounts and swaps describe them (Linux)."""

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_client.errors import FlashError

REFUSALS = ("mounted", "system", "fixed")
"""What may be insisted on, each by its name."""
_SECTOR = 512
_SYSTEM_PLACES = ("/", "/boot", "/usr", "/var", "/home", "/etc")
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Machine:
    """Where the kernel says what it has; another folder for a test."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")


@dataclass(frozen=True)
class Device:
    """A whole disk."""

    path: Path
    name: str
    """The kernel's, such as ``sdb`` or ``mmcblk0``."""
    size: int
    """Bytes."""
    removable: bool
    """Whether it looks like a card: one that can be taken out, or a reader's."""
    places: tuple[str, ...]
    """Where it, or what lies on it, is mounted; ``swap`` where it is swapped to."""
    model: str = ""

    @property
    def system(self) -> bool:
        """Whether this machine runs from it."""
        return any(place in _SYSTEM_PLACES or place == "swap" for place in self.places)

    def __str__(self) -> str:
        return f"{self.path} ({self.model or 'no model name'}, {self.size / 1e9:.1f} GB)"


def find(path: Path, machine: Machine) -> Device:
    """A device as the kernel describes it.

    Raises:
        FlashError: it is no block device, or a part of one.
    """
    name = Path(os.path.realpath(path)).name
    block = machine.sys / "class" / "block"
    entry = block / name
    if not entry.exists():
        raise FlashError(
            f"{path} is no block device here; expected a card's, such as /dev/sdb or /dev/mmcblk0 (where there is no "
            "Linux, write an image with -o)"
        )
    if (entry / "partition").exists():
        whole = Path(os.path.realpath(entry)).parent.name
        raise FlashError(f"{path} is a partition; name the whole card, /dev/{whole}")
    size = int(_text(entry / "size") or 0) * _SECTOR
    if size == 0:
        raise FlashError(f"{path} has no size; is there a card in the reader?")
    real = os.path.realpath(entry)
    removable = _text(entry / "removable") == "1" or _text(entry / "device" / "type") == "SD" or "/usb" in real
    numbers = {_text(one / "dev") for one in _upon(block, name)}
    names = {one.name for one in _upon(block, name)}
    places = tuple(sorted({*_mounts(machine, numbers, names), *_swaps(machine, names)}))
    return Device(path, name, size, removable, places, _text(entry / "device" / "model"))


def check(device: Device, *, needed: int, most: int, insisted: Collection[str] = ()) -> None:
    """See that a device may be overwritten; ``needed`` and ``most`` are the image's size and what a card may have.

    Raises:
        FlashError: it may not; why, and what to say where it shall be.
    """
    if device.system and "system" not in insisted:
        raise FlashError(
            f"{device} is a disk that this machine runs from ({', '.join(device.places)}): all of it would be lost; if "
            "you mean it, --force system"
        )
    if device.places and not device.system and "mounted" not in insisted:
        raise FlashError(
            f"{device} is in use ({', '.join(device.places)}): unmount it first (umount {device.path}*), or say "
            "--force mounted"
        )
    if not device.removable and "fixed" not in insisted:
        raise FlashError(f"{device} does not look like a card or a reader; if it is one, --force fixed")
    if device.size > most:
        raise FlashError(
            f"{device} is larger than a card usually is ({most / 1e9:.0f} GB): is it the right one? Then --max-size "
            f"{-(-device.size // 10**9)}G"
        )
    if device.size < needed:
        raise FlashError(f"{device} is too small: the image has {needed / 1e9:.1f} GB")


def size_of(text: str) -> int:
    """Bytes from a number with K, M, G or T behind it, which are powers of 1000, as on a card's label.

    Raises:
        FlashError: it is none.
    """
    found = re.fullmatch(r"(\d{1,6})([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise FlashError(f"--max-size {text!r}: expected a number and K, M, G or T, such as 64G")
    return int(found[1]) * int(1000 ** " KMGT".index(found[2] or " "))


def _upon(block: Path, name: str) -> Iterator[Path]:
    """A disk, its partitions, and what is made of them: encrypted and logical volumes, arrays."""
    entry = block / name
    yield entry
    parts = [child.name for child in entry.iterdir() if (child / "partition").exists()] if entry.is_dir() else []
    holders = [child.name for child in (entry / "holders").iterdir()] if (entry / "holders").is_dir() else []
    for child in (*parts, *holders):
        if (block / child).exists():
            yield from _upon(block, child)


def _mounts(machine: Machine, numbers: set[str], names: set[str]) -> Iterator[str]:
    """Mount points of devices, by their numbers; by their names too, as btrfs mounts have numbers of their own."""
    for line in _text(machine.proc / "self" / "mountinfo").splitlines():
        fields = line.split(" ")
        source = fields[fields.index("-") + 2] if "-" in fields[6:] else ""
        if fields[2] in numbers or (source.startswith("/dev/") and Path(os.path.realpath(source)).name in names):
            yield _ESCAPE.sub(lambda found: chr(int(found[1], 8)), fields[4])


def _swaps(machine: Machine, names: set[str]) -> Iterator[str]:
    for line in _text(machine.proc / "swaps").splitlines()[1:]:
        if line.split() and Path(os.path.realpath(line.split()[0])).name in names:
            yield "swap"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
