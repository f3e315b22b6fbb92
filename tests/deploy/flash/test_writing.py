"""What is written is read back from the medium; a difference, a missing piece and a full disk are noticed.

A file stands for the block device: what a device does otherwise is the kernel's.
"""

import errno
import os

import pytest

from deploy.flash.image import CHUNK
from deploy.flash.writing import verify, write_device, write_image
from edge_client.errors import FlashError

CHUNKS = [os.urandom(CHUNK), bytes(CHUNK), os.urandom(CHUNK), os.urandom(512)]
WHOLE = b"".join(CHUNKS)


def ignore(_):
    pass


def test_an_image_is_written_with_holes_for_its_owner_alone(tmp_path):
    path, told = tmp_path / "card.img", []
    path.write_text("an older one")
    write_image(path, CHUNKS, told.append)
    verify(path, CHUNKS, told.append)
    assert path.read_bytes() == WHOLE
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 < len(WHOLE)
    assert sum(told) == 2 * len(WHOLE)
    assert list(tmp_path.iterdir()) == [path]


def test_an_image_that_cannot_be_finished_leaves_the_older_one(tmp_path):
    def pieces():
        yield CHUNKS[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "card.img"
    path.write_text("an older one")
    with pytest.raises(FlashError, match="No space left"):
        write_image(path, pieces(), ignore)
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("start", [0, 4096])
def test_a_device_is_written_with_its_zeros_and_nothing_else(tmp_path, start):
    path, before = tmp_path / "device", b"\xff" * (start + len(WHOLE) + 4096)
    path.write_bytes(before)
    write_device(path, CHUNKS, ignore, start=start, shared=True)
    verify(path, CHUNKS, ignore, start=start)
    assert path.read_bytes() == before[:start] + WHOLE + before[start + len(WHOLE) :]


def test_a_card_that_is_pulled_out_has_no_partition_table(tmp_path):
    def pieces():
        yield from CHUNKS[:2]
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "device"
    path.write_bytes(b"\xff" * len(WHOLE))
    with pytest.raises(FlashError, match=r"Input/output error.*in its reader"):
        write_device(path, pieces(), ignore, shared=True)
    assert path.read_bytes()[:CHUNK] == bytes(CHUNK)


@pytest.mark.parametrize("place", [0, CHUNK + 5, len(WHOLE) - 1])
def test_a_byte_that_reads_back_otherwise_is_found(tmp_path, place):
    path = tmp_path / "device"
    path.write_bytes(WHOLE)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([WHOLE[place] ^ 1]))
    with pytest.raises(FlashError, match=f"at byte {place}:"):
        verify(path, CHUNKS, ignore)


def test_a_card_that_is_smaller_than_it_says_is_found(tmp_path):
    path = tmp_path / "device"
    path.write_bytes(WHOLE[: 2 * CHUNK])
    with pytest.raises(FlashError, match=f"at byte {2 * CHUNK}:"):
        verify(path, CHUNKS, ignore)


def test_who_may_not_write_a_device_is_told_who_may(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FlashError, match="as root, or as a member of the group disk"):
        write_device(tmp_path / "device", CHUNKS, ignore, shared=False)
