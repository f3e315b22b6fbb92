import io
import shutil
import subprocess
import tarfile

import pytest

from deploy.flash.disk import partitions
from deploy.flash.ext import Ext
from deploy.flash.image import Base
from deploy.image.card import BOOT_START, DISK, ROOT_START, assemble
from deploy.image.layer import Layer
from edge_client.errors import ConfigError

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
pytestmark = pytest.mark.skipif(
    any(shutil.which(one, path=_PATH) is None for one in ("sfdisk", "mke2fs", "mcopy", "debugfs")),
    reason="needs the Debian packages fdisk, e2fsprogs and mtools",
)
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00" + bytes(40)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """A card of a system that has what counts, with a client over it."""
    folder = tmp_path_factory.mktemp("card")
    system = Layer()
    system.file("usr/lib/os-release", b'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n')
    system.file("usr/bin/python3.11", ELF)
    system.link("usr/bin/python3", "python3.11")
    system.file("boot/firmware/cmdline.txt", b"console=tty0\n")
    system.file("boot/firmware/start.elf", b"firmware")
    system.file("etc/hostname", b"before\n")
    (folder / "system.tar").write_bytes(system.pack())
    with tarfile.open(folder / "system.tar", "a") as tar:
        info = tarfile.TarInfo("etc/shadow")
        info.mode, info.gid, info.size = 0o640, 42, 1
        tar.addfile(info, io.BytesIO(b"x"))
    client = Layer()
    client.link("opt/fedge/current", "releases/7.1")
    client.file("etc/hostname", b"after\n")
    (folder / "client.tar").write_bytes(client.pack())
    (folder / "scratch").mkdir()
    image = folder / "card.img"
    assemble(image, [folder / "system.tar", folder / "client.tar"], folder / "scratch", spare=8)
    return image


def test_a_pi_finds_its_boot_partition_and_the_kernel_its_root(card):
    with card.open("rb") as disk:
        found = partitions(disk)
        disk.seek(440)
        assert int.from_bytes(disk.read(4), "little") == DISK
    assert [(one.number, one.start, one.kind) for one in found] == [(1, BOOT_START, "fat"), (2, ROOT_START, "linux")]
    assert found[-1].start + found[-1].size == card.stat().st_size


def test_fedge_flash_knows_it_for_a_system_with_a_client(card, tmp_path):
    image = Base.of(card)
    boot = image.extract_boot(tmp_path / "boot")
    assert boot.names() == {"cmdline.txt", "start.elf"}
    assert boot.read("start.elf") == b"firmware"
    assert image.system(boot).kind == "client"


def test_files_keep_owners_and_modes_and_the_client_lies_over_the_system(card):
    root = Ext(card, ROOT_START)
    assert root.read("/etc/hostname") == b"after\n"
    assert root.exists("/boot/firmware")
    assert not root.exists("/boot/firmware/cmdline.txt")
    command = ["debugfs", "-R", "stat /etc/shadow", f"{card}?offset={ROOT_START}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": _PATH}).stdout
    assert "Mode:  0640" in told
    assert "Group:    42" in told
    checked = ["e2fsck", "-fn", f"{card}?offset={ROOT_START}"]
    assert subprocess.run(checked, capture_output=True, check=False, env={"PATH": _PATH}).returncode == 0


def test_a_program_that_is_missing_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.image.card.shutil.which", lambda name, path: None if name == "mcopy" else name)
    with pytest.raises(ConfigError, match=r"mcopy not found: install .*mtools"):
        assemble(tmp_path / "card.img", [], tmp_path)
