"""A Raspberry Pi, or a board like one, in QEMU: full-system emulation, its console as lines, its power a switch.

QEMU has no GPU firmware: kernel, initramfs and device tree are taken from the card's boot partition and handed over, so
config.txt and the firmware itself are not tested.
"""

import contextlib
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.image.card import BOOT_START

BROKER = ("10.0.2.100", 8883)
"""Where a guest finds the broker; the only address that it reaches."""
_CABLE = Path(__file__).parent / "cable.py"


@dataclass(frozen=True)
class Board:
    """What QEMU is told of a board, and what its kernel is."""

    machine: tuple[str, ...]
    disk: tuple[str, ...]
    network: str
    console: str
    device_tree: str = ""
    clock: bool = True
    """Whether it has a clock that runs without power."""
    words: tuple[str, ...] = ()
    """More of the kernel's command line."""


BOARDS = {
    "virt": Board(
        ("-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-serial", "stdio"),
        ("if=none,id=card", "-device", "virtio-blk-device,drive=card"),
        "virtio-net-device",
        "ttyAMA0",
    ),
    "raspi3b": Board(
        ("-M", "raspi3b", "-serial", "null", "-serial", "stdio"),
        ("if=sd",),
        "usb-net",
        "ttyS1,115200",
        "bcm2837-rpi-3-b.dtb",
        clock=False,
        # QEMU's board is reset when its watchdog is set, and not when it has run out.
        words=("systemd.watchdog_sec=off", "modprobe.blacklist=bcm2835_wdt"),
    ),
}


def boot_files(image: Path, folder: Path) -> None:
    """Copy what a Pi's firmware would load to a folder: ``kernel``, ``initrd`` and the device trees."""
    folder.mkdir(exist_ok=True)
    place = ["-i", f"{image}@@{BOOT_START}"]
    subprocess.run(["mcopy", "-n", "-o", *place, "::vmlinuz-*", "::initrd.img-*", "::*.dtb", str(folder)], check=True)
    for pattern, name in (("vmlinuz-*", "kernel"), ("initrd.img-*", "initrd")):
        (found,) = folder.glob(pattern)
        found.rename(folder / name)


class Machine:
    """A board that is on, until it is killed; what its console says goes into ``log`` as well."""

    def __init__(
        self, board: str, image: Path, boot: Path, relay: int, log: Path, *words: str, disks: Sequence[Path] = ()
    ) -> None:
        """``relay``: the port on this machine that `BROKER` is; ``words``: more of the kernel's command line."""
        kind = BOARDS[board]
        line = f"console={kind.console} root=PARTUUID=fed6ed6e-02 rw rootwait net.ifnames=0 panic=-1 loglevel=4"
        line += " systemd.show_status=0"
        cable = f"{sys.executable} -S {_CABLE} {relay}"
        host, port = BROKER
        command = ["nice", "-n", "5", "qemu-system-aarch64", *kind.machine, "-display", "none", "-monitor", "none"]
        command += ["-no-reboot", "-kernel", str(boot / "kernel"), "-initrd", str(boot / "initrd")]
        command += ["-append", " ".join([line, *kind.words, *words])]
        command += ["-dtb", str(boot / kind.device_tree)] if kind.device_tree else []
        command += ["-drive", f"file={image},format=raw,{kind.disk[0]}", *kind.disk[1:]]
        command += ["-netdev", f"user,id=net,restrict=on,guestfwd=tcp:{host}:{port}-cmd:{cable}"]
        command += ["-device", f"{kind.network},netdev=net"]
        for number, disk in enumerate(disks):
            command += ["-drive", f"file={disk},format=raw,if=none,id=more{number},readonly=on"]
            command += ["-device", f"virtio-blk-device,drive=more{number}"]
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        """Seconds since power-on, and what was said."""
        self._log = log
        self._coming: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def heard(self, *words: str, seconds: float) -> tuple[float, str] | None:
        """The next line that has one of these words, with its time; None where none comes, or the power goes first."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (said := self._coming.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                self.lines.append(said)
                if any(word in said[1] for word in words):
                    return said
            self._coming.put(None)
        return None

    def until(self, *words: str, seconds: float = 1200.0) -> tuple[float, str]:
        """Read on until a line has one of these words."""
        said = self.heard(*words, seconds=seconds)
        last = "\n".join(line for _, line in self.lines[-15:])
        assert said is not None, f"none of {words} was said within {seconds:g} s; see {self._log}:\n{last}"
        return said

    def cut(self) -> None:
        """Pull the power, and take what was said until then as read."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        with contextlib.suppress(queue.Empty):
            while (said := self._coming.get_nowait()) is not None:
                self.lines.append(said)

    def said(self, words: str) -> list[str]:
        """Lines read so far that have these words."""
        return [line for _, line in self.lines if words in line]

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.cut()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("a", encoding="utf-8") as log:
            for raw in self.process.stdout:
                # A console's carriage returns and colours.
                line = raw.decode("utf-8", "replace").rstrip().replace("\r", "")
                after = time.monotonic() - self.began
                log.write(f"{after:8.2f} {line}\n")
                log.flush()
                self._coming.put((after, line))
        self._coming.put(None)


def missing() -> str:
    """What this machine lacks to emulate a board; nothing where it lacks nothing."""
    needed = ("qemu-system-aarch64", "mcopy", "debugfs", "e2fsck")
    path = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
    return " ".join(one for one in needed if shutil.which(one) is None and shutil.which(one, path=path) is None)
