"""Images are unpacked whatever packs them; what is cut off or damaged is noticed before anything is written."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from deploy.flash.image import CHUNK, Base, packed, unpack
from edge_client.errors import FlashError
from tests.cards import BOOT, MIB, card, needs_tools

DATA = b"boot" + bytes(3 * CHUNK) + b"root" + bytes(100)


def zipped(path, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", "x")
        archive.writestr("card.img", data)


PACK = {
    ".xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    ".gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    ".bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    ".zip": zipped,
}


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_packed_is_unpacked_with_holes(tmp_path, suffix):
    path, target, told = tmp_path / "card", tmp_path / "raw", []
    PACK[suffix](path, DATA)
    assert packed(path) == suffix
    unpack(path, target, told.append)
    assert target.read_bytes() == DATA
    assert target.stat().st_blocks * 512 < len(DATA) / 2
    assert 0 < sum(told) <= path.stat().st_size


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_cut_off_is_refused(tmp_path, suffix):
    path = tmp_path / "card"
    PACK[suffix](path, DATA)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FlashError, match="damaged or cut off"):
        unpack(path, tmp_path / "raw", lambda _: None)


def test_a_zip_file_of_several_images_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "card", "w") as archive:
        archive.writestr("a.img", "x")
        archive.writestr("b.img", "x")
    with pytest.raises(FlashError, match="2 images"):
        unpack(tmp_path / "card", tmp_path / "raw", lambda _: None)


@needs_tools
def test_an_image_that_is_cut_off_is_refused(tmp_path):
    path = card(tmp_path / "card.img", "firstrun")
    with path.open("r+b") as file:
        file.truncate(30 * MIB)
    with pytest.raises(FlashError, match="cut off"):
        Base.of(path)


@needs_tools
def test_a_card_is_read_with_another_boot_partition(tmp_path):
    path = card(tmp_path / "card.img", "firstrun")
    other = tmp_path / "boot.img"
    other.write_bytes(b"\xaa" * (BOOT[1] * MIB))
    composed = b"".join(Base.of(path).chunks(other))
    whole, (start, size) = path.read_bytes(), BOOT
    assert composed == whole[: start * MIB] + b"\xaa" * (size * MIB) + whole[(start + size) * MIB :]
