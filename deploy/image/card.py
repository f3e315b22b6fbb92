"""A card's image from the files of a system: a FAT that a Pi boots from and an ext4 root, without loop devices.

A Pi's boot ROM reads an MBR and the first FAT partition (Raspberry Pi documentation, "Raspberry Pi boot modes").
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from edge_client.errors import ConfigError

DISK = 0xFED6ED6E
"""The MBR's identity; its partitions are ``fed6ed6e-01`` and ``-02`` to the kernel and in /etc/fstab."""
_MIB = 1 << 20
BOOT_START, BOOT_SIZE = 4 * _MIB, 252 * _MIB
"""Bytes. Two kernels with their initramfs fit, as an update needs them."""
ROOT_START = BOOT_START + BOOT_SIZE
_UUID = "fed6ed6e-0000-4000-8000-000000000002"
_LABEL = "FEDGE"


def assemble(image: Path, layers: list[Path], scratch: Path, *, spare: int = 192) -> None:
    """Write an image.

    Args:
        image: the file to write.
        layers: tars of the system's files, the later ones over the earlier ones; those in /boot/firmware go to the FAT.
        scratch: an empty folder, in which all of it is unpacked.
        spare: MiB that are free on the root until it grows to its card at the first boot.

    Raises:
        ConfigError: a program is missing, or fails.
    """
    needed = ["sfdisk", "mke2fs", "mformat", "mcopy"] + ([] if os.geteuid() == 0 else ["fakeroot"])
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    lacking = [one for one in needed if shutil.which(one, path=path) is None]
    if lacking:
        raise ConfigError(f"{' and '.join(lacking)} not found: install fdisk, e2fsprogs, mtools and fakeroot")
    root, boot = scratch / "root", scratch / "boot"
    unpack = " && ".join(
        f"tar -C {shlex.quote(str(root))} --numeric-owner -xpf {shlex.quote(str(layer))}" for layer in layers
    )
    # In one go: who owns what is known to fakeroot alone. What is found by its size is 4 KiB blocks.
    script = f"""
set -eu
mkdir {shlex.quote(str(root))}
{unpack}
mv {shlex.quote(str(root))}/boot/firmware {shlex.quote(str(boot))}
mkdir -m 755 {shlex.quote(str(root))}/boot/firmware
used=$(du -s --apparent-size --block-size=1M {shlex.quote(str(root))} | cut -f1)
files=$(find {shlex.quote(str(root))} | wc -l)
size=$(((used * 106 / 100 + files / 256 + {spare} + 3) / 4 * 4))
truncate -s 0 {shlex.quote(str(image))}
truncate -s $(({ROOT_START} + size * {_MIB})) {shlex.quote(str(image))}
mke2fs -q -F -t ext4 -b 4096 -m 1 -L fedge -U {_UUID} -i 16384 \
    -E offset={ROOT_START},hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0,nodiscard \
    -d {shlex.quote(str(root))} {shlex.quote(str(image))} $((size * 256))
"""
    _run([*([] if os.geteuid() == 0 else ["fakeroot", "--"]), "sh", "-c", script], path)
    table = f"label: dos\nlabel-id: {DISK:#010x}\nunit: sectors\n"
    table += (
        f"start={BOOT_START // 512}, size={BOOT_SIZE // 512}, type=c, bootable\nstart={ROOT_START // 512}, type=83\n"
    )
    _run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(image)], path, table)
    place = f"{image}@@{BOOT_START}"
    _run(["mformat", "-i", place, "-F", "-T", str(BOOT_SIZE // 512), "-h", "255", "-s", "63", "-v", _LABEL, "::"], path)
    _run(["mcopy", "-i", place, "-s", "-m", *map(str, sorted(boot.iterdir())), "::"], path)


def _run(command: list[str], path: str, text: str | None = None) -> None:
    environment = os.environ | {"PATH": path, "LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1"}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason named").splitlines()[-1]
        raise ConfigError(f"{command[0]} failed while the image was made: {reason}")
