"""Files of a FAT partition, written and read by mtools."""

import pytest

from deploy.flash.fat import Fat
from edge_client.errors import FlashError
from tests.cards import MIB, needs_tools, run

pytestmark = needs_tools


@pytest.fixture
def fat(tmp_path):
    path = tmp_path / "boot.img"
    with path.open("wb") as file:
        file.truncate(36 * MIB)
    run("mkfs.vfat", "-F", "32", path)
    return Fat(path)


def test_files_are_written_replaced_read_and_removed(fat, tmp_path):
    source = tmp_path / "x.whl"
    source.write_bytes(bytes(range(256)) * 100)
    long = "fedge/wheels/onnxruntime-1.32.0-cp313-cp313-manylinux_2_28_aarch64.whl"
    fat.write({"cmdline.txt": b"a long line\n", long: source, "fedge/Claim.TXT": b"\r\n\0\xff", "fedge/empty": b""})
    fat.write({"cmdline.txt": b"short\n"})
    assert fat.names() == {"cmdline.txt", "fedge"}
    assert fat.names("fedge") == {"wheels", "Claim.TXT", "empty"}
    assert (fat.read(long), fat.read("fedge/Claim.TXT")) == (source.read_bytes(), b"\r\n\0\xff")
    assert (fat.read("cmdline.txt"), fat.read("fedge/empty"), fat.read("no/where")) == (b"short\n", b"", None)
    fat.remove("fedge")
    fat.remove("fedge")
    assert fat.names() == {"cmdline.txt"}


def test_what_does_not_fit_is_refused_before_it_is_written(fat):
    with pytest.raises(FlashError, match=r"full: no room for big \(40960 KiB\)"):
        fat.write({"small": b"x", "big": bytes(40 * MIB)})
    assert fat.names() == set()


def test_a_program_that_is_missing_is_named_with_its_package(fat, monkeypatch):
    monkeypatch.setattr("deploy.flash.fat.shutil.which", lambda *_, **__: None)
    with pytest.raises(FlashError, match="apt-get install mtools"):
        fat.names()
