"""Partitions of an image or a card, found without mounting it (MBR; UEFI specification 2.10, section 5, for GPT)."""

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from edge_client.errors import FlashError

SECTOR = 512
_MBR_TABLE = 446
_PROTECTIVE = 0xEE
_GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_MOST_ENTRIES = 1024
_FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF})
_LINUX_TYPE = 0x83
_GPT_KINDS = {
    # Basic data, EFI system, Linux, Linux root on 64-bit ARM; stored little-endian in their first three groups.
    bytes.fromhex("a2a0d0ebe5b9334487c068b6b72699c7"): "fat",
    bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b"): "fat",
    bytes.fromhex("af3dc60f838472478e793d69d8477de4"): "linux",
    bytes.fromhex("45b021b9f01dc341af444c6f280d3fae"): "linux",
}


@dataclass(frozen=True)
class Partition:
    """A partition as its table has it."""

    number: int
    start: int
    """Bytes from the beginning of the disk."""
    size: int
    """Bytes."""
    kind: str
    """``fat``, ``linux`` or ``other``: what the table says, not what is in it."""


def partitions(disk: BinaryIO) -> tuple[Partition, ...]:
    """The partitions of a disk in the order of its table; sectors have 512 bytes.

    Raises:
        FlashError: there is no table, or one that is damaged.
    """
    first = _read(disk, 0, SECTOR)
    if len(first) < SECTOR or first[510:] != b"\x55\xaa":
        raise FlashError("no partition table; expected the image of a whole card, such as Raspberry Pi OS Lite's .img")
    entries = [first[_MBR_TABLE + 16 * number :][:16] for number in range(4)]
    if any(entry[4] == _PROTECTIVE for entry in entries):
        return _gpt(disk)
    found = []
    for number, entry in enumerate(entries, start=1):
        start, count = struct.unpack_from("<II", entry, 8)
        if entry[4] and count:
            kind = "fat" if entry[4] in _FAT_TYPES else "linux" if entry[4] == _LINUX_TYPE else "other"
            found.append(Partition(number, start * SECTOR, count * SECTOR, kind))
    return tuple(found)


def _gpt(disk: BinaryIO) -> tuple[Partition, ...]:
    header = _read(disk, SECTOR, SECTOR)
    if len(header) < SECTOR or header[:8] != b"EFI PART":
        raise FlashError("the GUID partition table is missing, although the first sector announces one; image damaged?")
    _, _, length, checksum, _, _, _, _, _, _, place, count, size, table_checksum = _GPT_HEADER.unpack_from(header)
    if not _GPT_HEADER.size <= length <= SECTOR or not 128 <= size <= 4096 or count > _MOST_ENTRIES:
        raise FlashError("the GUID partition table's header has sizes that cannot be; image damaged?")
    blank = header[:16] + bytes(4) + header[20:length]
    table = _read(disk, place * SECTOR, count * size)
    if zlib.crc32(blank) != checksum or zlib.crc32(table) != table_checksum:
        raise FlashError("the GUID partition table does not fit its checksum; image damaged?")
    found = []
    for number in range(count):
        entry = table[number * size :][:size]
        first, last = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]):
            kind = _GPT_KINDS.get(entry[:16], "other")
            found.append(Partition(number + 1, first * SECTOR, (last - first + 1) * SECTOR, kind))
    return tuple(found)


def _read(disk: BinaryIO, place: int, count: int) -> bytes:
    disk.seek(place)
    return disk.read(count)
