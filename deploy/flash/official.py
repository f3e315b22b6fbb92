"""Which system is on a card: what sets it up at its first boot, for which processor, with which Python.

The ways are those of Raspberry Pi Imager (its doc/os_customisation_formats.md): ``systemd`` runs a script that the
kernel's command line names, ``cloudinit-rpi`` reads user-data and network-config from the boot partition; and the one
of rpi-preseed, which reads ``rpi-preseed.toml`` there.
"""

import re
import struct
from dataclasses import dataclass
from typing import Literal

from deploy.flash.ext import Ext
from deploy.flash.fat import Fat
from edge_client.errors import FlashError

Kind = Literal["firstrun", "cloud-init", "preseed", "client"]
"""``client`` is a system that has a client already and reads the folder by itself: built by us, or prepared earlier."""

OURS = "# Written by fedge flash."
"""The line by which what an earlier run has written is known."""
_MACHINES = {0xB7: "arm64", 0x28: "armhf", 0x3E: "amd64"}
_ELF_MACHINE = struct.Struct("<18xH")
_OLDEST = (3, 11)


@dataclass(frozen=True)
class System:
    """What is on a card, as far as it decides what is written."""

    kind: Kind
    name: str
    """As the system calls itself, such as ``Debian GNU/Linux 13 (trixie)``."""
    python: str
    """Such as ``3.13``."""
    foreign: str = ""
    """What shows that another program has set this card up already; empty where nothing does."""


def inspect(boot: Fat, root: Ext) -> System:
    """What is on the boot and root partitions of a card.

    Raises:
        FlashError: it is no system that a client can be put on; why.
    """
    about = (root.read("/usr/lib/os-release") or b"").decode(errors="replace")
    fields = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', about, re.MULTILINE))
    name = fields.get("PRETTY_NAME", "")
    if fields.get("ID") not in ("debian", "raspbian"):
        raise FlashError(
            f"the card holds {name or 'no system that says its name'}; expected Raspberry Pi OS Lite (64-bit), "
            "Bookworm or newer"
        )
    python = _python(root, name)
    names = boot.names()
    if "cmdline.txt" not in names:
        raise FlashError("the boot partition has no cmdline.txt; expected that of a Raspberry Pi")
    if root.exists("/opt/fedge/current"):
        return System("client", name, python)
    if root.exists("/usr/bin/rpi-preseed"):
        if root.exists("/var/lib/rpi-preseed/applied"):
            raise FlashError(
                "this card has booted before, and rpi-preseed sets a system up once: write the image to it anew"
            )
        kind: Kind = "preseed"
    elif {"user-data", "meta-data"} <= names and root.exists("/usr/bin/cloud-init"):
        kind = "cloud-init"
    elif root.exists("/usr/lib/raspberrypi-sys-mods"):
        kind = "firstrun"
    else:
        raise FlashError(
            f"{name} has none of the ways in which Raspberry Pi OS is set up at its first boot (firstrun.sh, "
            "cloud-init, rpi-preseed); expected Raspberry Pi OS Lite (64-bit), or an image of `fedge flash --build`"
        )
    return System(kind, name, python, _foreign(boot, names))


def _python(root: Ext, name: str) -> str:
    found = re.fullmatch(r"python(3)\.(\d+)", root.link("/usr/bin/python3") or "")
    if found is None:
        raise FlashError(f"{name} has no Python; expected Raspberry Pi OS Lite (64-bit), which has one")
    version = f"{found[1]}.{found[2]}"
    head = root.read(f"/usr/bin/python{version}", _ELF_MACHINE.size) or b""
    if head[:4] != b"\x7fELF" or len(head) < _ELF_MACHINE.size:
        raise FlashError(f"/usr/bin/python{version} on the card is no program; image damaged?")
    (machine,) = _ELF_MACHINE.unpack_from(head)
    wide = head[4] == 2
    if not wide or _MACHINES.get(machine) != "arm64":
        found_is = f"{'64' if wide else '32'}-bit {_MACHINES.get(machine, f'machine {machine}')}"
        raise FlashError(
            f"{name} on the card is {found_is}: ONNX Runtime has wheels for 64-bit ARM alone; take Raspberry Pi OS "
            "Lite (64-bit), which runs on a Pi 3, 4, 5, 400 and Zero 2 W"
        )
    if (int(found[1]), int(found[2])) < _OLDEST:
        raise FlashError(f"{name} on the card has Python {version}; expected 3.11 or later: take Bookworm or newer")
    return version


def _foreign(boot: Fat, names: set[str]) -> str:
    line = boot.read("cmdline.txt") or b""
    for sign in (b"i=rpi-imager", b"systemd.run="):
        if sign in line and b"fedge" not in line:
            return f"{sign.decode()} in cmdline.txt"
    for file in ("firstrun.sh", "rpi-preseed.toml", "custom.toml"):
        if file in names and OURS.encode() not in (boot.read(file) or b""):
            return file
    return ""
