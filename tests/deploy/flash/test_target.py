"""Which devices may be written, over trees that stand for /sys and /proc."""

import pytest

from deploy.flash.target import Machine, check, find, size_of
from edge_client.errors import FlashError

GB = 10**9


class Tree:
    """A machine with disks."""

    def __init__(self, folder):
        self.block, self.devices = folder / "sys" / "class" / "block", folder / "sys" / "devices"
        self.machine = Machine(folder / "sys", folder / "proc")
        (folder / "proc" / "self").mkdir(parents=True)
        self.block.mkdir(parents=True)
        self.mounts, self.swaps = folder / "proc" / "self" / "mountinfo", folder / "proc" / "swaps"
        self.mounts.write_text("22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw\n")
        self.swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n")

    def disk(self, name, number, *, bus="pci0/ata1", size=32 * GB, removable=0, kind=None, parts=()):
        place = self.devices / bus / name
        (place / "device").mkdir(parents=True)
        (place / "holders").mkdir()
        (place / "size").write_text(f"{size // 512}\n")
        (place / "removable").write_text(f"{removable}\n")
        (place / "dev").write_text(f"{number}\n")
        (place / "device" / "model").write_text("Card Reader  \n")
        if kind:
            (place / "device" / "type").write_text(kind)
        (self.block / name).symlink_to(place)
        for index, part in enumerate(parts, 1):
            (place / part / "holders").mkdir(parents=True)
            (place / part / "partition").write_text(f"{index}\n")
            major, minor = number.split(":")
            (place / part / "dev").write_text(f"{major}:{int(minor) + index}\n")
            (place / part / "size").write_text("100\n")
            (self.block / part).symlink_to(place / part)

    def mount(self, number, place, source="/dev/x", kind="ext4"):
        with self.mounts.open("a") as file:
            file.write(f"30 1 {number} / {place} rw,relatime shared:1 master:2 - {kind} {source} rw\n")


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def checked(tree, name, needed=GB, most=256 * GB, insisted=()):
    device = find(f"/dev/{name}", tree.machine)
    check(device, needed=needed, most=most, insisted=insisted)
    return device


@pytest.mark.parametrize(
    "options", [{"removable": 1}, {"bus": "pci0/usb2/2-1"}, {"kind": "SD"}], ids=["removable", "usb", "sd"]
)
def test_a_card_may_be_written(tree, options):
    tree.disk("sdb", "8:16", parts=["sdb1", "sdb2"], **options)
    device = checked(tree, "sdb")
    assert (device.size, device.removable, device.places) == (32 * GB, True, ())
    assert str(device) == "/dev/sdb (Card Reader, 32.0 GB)"


@pytest.mark.parametrize("insisted", [(), ("system", "fixed")])
def test_a_mounted_card_is_refused_unless_told(tree, insisted):
    tree.disk("mmcblk0", "179:0", kind="SD", parts=["mmcblk0p1"])
    tree.mount("179:1", "/media/my\\040card")
    with pytest.raises(FlashError, match=r"in use \(/media/my card\).*--force mounted"):
        checked(tree, "mmcblk0", insisted=insisted)
    assert checked(tree, "mmcblk0", insisted=("mounted",)).places == ("/media/my card",)


def test_the_disk_that_the_machine_runs_from_is_refused_unless_told(tree):
    tree.disk("sda", "8:0", removable=1, parts=["sda1", "sda2"])
    tree.mount("8:2", "/")
    for insisted in ((), ("mounted", "fixed")):
        with pytest.raises(FlashError, match="--force system"):
            checked(tree, "sda", insisted=insisted)
    assert checked(tree, "sda", insisted=("system",)).system


def test_what_lies_on_encrypted_and_logical_volumes_counts(tree):
    tree.disk("nvme0n1", "259:0", parts=["nvme0n1p1"])
    tree.disk("dm-0", "253:0", bus="virtual/block")
    (tree.block / "nvme0n1p1" / "holders" / "dm-0").symlink_to(tree.block / "dm-0")
    tree.mount("253:0", "/")
    with pytest.raises(FlashError, match="this machine runs from"):
        checked(tree, "nvme0n1", insisted=("fixed", "mounted"))


def test_btrfs_whose_mounts_have_numbers_of_their_own_counts(tree):
    tree.disk("sdc", "8:32", removable=1, parts=["sdc1"])
    tree.mount("0:45", "/srv", source="/dev/sdc1", kind="btrfs")
    with pytest.raises(FlashError, match="--force mounted"):
        checked(tree, "sdc")


def test_swap_counts(tree):
    tree.disk("sdd", "8:48", removable=1, parts=["sdd1"])
    with tree.swaps.open("a") as file:
        file.write("/dev/sdd1 partition 1000 0 -2\n")
    with pytest.raises(FlashError, match="--force system"):
        checked(tree, "sdd")


@pytest.mark.parametrize(
    ("options", "arguments", "reason"),
    [
        ({}, {}, "--force fixed"),
        ({"removable": 1, "size": 2000 * GB}, {}, "--max-size 2000G"),
        ({"removable": 1, "size": GB}, {"needed": 3 * GB}, "too small"),
        ({"removable": 1, "size": 0}, {}, "is there a card in the reader"),
    ],
    ids=["fixed", "large", "small", "empty"],
)
def test_what_is_no_fitting_card_is_refused(tree, options, arguments, reason):
    tree.disk("sde", "8:64", **options)
    with pytest.raises(FlashError, match=reason):
        checked(tree, "sde", **arguments)


def test_a_partition_and_what_is_no_device_are_refused(tree):
    tree.disk("sdf", "8:80", removable=1, parts=["sdf1"])
    with pytest.raises(FlashError, match="name the whole card, /dev/sdf"):
        find("/dev/sdf1", tree.machine)
    with pytest.raises(FlashError, match="no block device"):
        find("/dev/sdz", tree.machine)


@pytest.mark.parametrize(("text", "size"), [("64G", 64 * GB), ("1t", 10**12), ("500 M".replace(" ", ""), 5 * 10**8)])
def test_sizes_are_read(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1.5G", "9999999G"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(FlashError, match="--max-size"):
        size_of(text)
