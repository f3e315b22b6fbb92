"""Partition tables as sfdisk writes them are read; what is damaged is refused."""

import shutil
import subprocess

import pytest

from deploy.flash.disk import Partition, partitions
from edge_client.errors import FlashError

MIB = 1 << 20
SFDISK = shutil.which("sfdisk") or shutil.which("sfdisk", path="/usr/sbin:/sbin")
needs_sfdisk = pytest.mark.skipif(SFDISK is None, reason="needs sfdisk: apt-get install fdisk")


def image(folder, table):
    path = folder / "card.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run([SFDISK, "-q", path], input=table, text=True, check=True)
    return path


@needs_sfdisk
@pytest.mark.parametrize(
    "table",
    [
        "label: dos\nstart=2048, size=8192, type=c\nstart=12288, size=16384, type=83\n",
        "label: gpt\nstart=2048, size=8192, type=EBD0A0A2-B9E5-4433-87C0-68B6B72699C7\n"
        "start=12288, size=16384, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n",
    ],
)
def test_both_kinds_of_table_are_read(tmp_path, table):
    with image(tmp_path, table).open("rb") as disk:
        assert partitions(disk) == (Partition(1, MIB, 4 * MIB, "fat"), Partition(2, 6 * MIB, 8 * MIB, "linux"))


def test_a_file_without_a_table_is_refused(tmp_path):
    path = tmp_path / "card.img"
    path.write_bytes(bytes(4096))
    with path.open("rb") as disk, pytest.raises(FlashError, match="no partition table"):
        partitions(disk)


@needs_sfdisk
def test_a_damaged_guid_table_is_refused(tmp_path):
    path = image(tmp_path, "label: gpt\nstart=2048, size=8192\n")
    with path.open("r+b") as disk:
        disk.seek(1024 + 33)
        disk.write(b"\x7f")
        with pytest.raises(FlashError, match="checksum"):
            partitions(disk)
