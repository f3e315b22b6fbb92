"""From power-on to the last round, with the power pulled in between: the run that `make test-pi` does."""

import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.kills.account import Account
from tests.pi.card import additions, put_in_root, put_on_boot, take_from_root
from tests.pi.machine import BOARDS, Machine, boot_files
from tests.pi.scene import BATCH, DEVICE, SAMPLES, Scene

CARD = 4 << 30
"""Bytes of the emulated card; QEMU's slot wants a power of two."""
_PROBE = re.compile(r"probe: rss ([0-9.]+) hwm ([0-9.]+) cpu ([0-9.]+)")
_UP = 8192
"""Bytes of an upload that get through before the power goes: more than is said beside it, less than it has."""


@dataclass
class Measured:
    """What a run on one board came to; seconds are since power-on."""

    board: str
    boot_seconds: float = 0.0
    """Until the client's unit had started, with the first boot's work done and the device enrolled."""
    enrolled_seconds: float = 0.0
    first_update_seconds: float = 0.0
    """Until the device was told that its first update is recorded."""
    again_seconds: list[float] = field(default_factory=list)
    """After each power cut, until the client runs again."""
    client_rss_mib: float = 0.0
    """The most that was resident while it trained."""
    updates_accepted: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: list[str] = field(default_factory=list)
    cuts: int = 0


class Pi:
    """A card, and the board that it is in."""

    def __init__(self, board: str, image: Path, folder: Path, relay: int) -> None:
        self.board, self._folder, self._relay = board, folder, relay
        folder.mkdir(parents=True)
        self.card = folder / "card.img"
        shutil.copyfile(image, self.card)
        with self.card.open("r+b") as file:
            file.truncate(CARD)
        boot_files(self.card, folder / "boot")

    def fill(self, boot: dict[str, bytes], data: Path | None) -> None:
        """What the operator puts on it, and what the test needs to look inside."""
        put_on_boot(self.card, boot, self._folder)
        files = additions(clock=True)
        put_in_root(self.card, files | ({} if data is None else {"/var/lib/fedge/data/digits.npz": data}))

    def power(self, *disks: Path) -> Machine:
        """Switch it on, with more disks beside the card."""
        words = [] if BOARDS[self.board].clock else [f"systemd.clock_usec={time.time_ns() // 1000}"]
        console = self._folder / "console.log"
        return Machine(self.board, self.card, self._folder / "boot", self._relay, console, *words, disks=disks)

    def journal(self) -> Path:
        """The client's journal, once the power is off."""
        target = self._folder / "taken"
        take_from_root(self.card, "/var/lib/fedge/journal", target)
        return target / "journal"


def carry_out(
    board: str, image: Path, bundle: Path, folder: Path, *, cuts: int, steps: int, log: Callable[[str], None] = print
) -> Measured:
    """One board: enrol, take part, lose power ``cuts`` times (in training, then in an upload), go on, add up."""
    assert steps * BATCH >= SAMPLES, f"{steps} steps do not see all samples, and the account goes by all of them"
    measured = Measured(board)
    rounds = cuts + 2
    with closing(Scene(folder / "host", bundle, rounds, steps)) as scene:
        pi = Pi(board, image, folder / "pi", scene.relay.port)
        pi.fill(scene.card(), scene.folder / "digits.npz")
        log(f"{board}: power on")
        machine = pi.power()
        try:
            measured.enrolled_seconds = machine.until(f"{DEVICE} is enrolled")[0]
            measured.boot_seconds = machine.until(f"{DEVICE}: joining")[0]
            measured.first_update_seconds = machine.until('"recorded": true')[0]
            log(
                f"{board}: enrolled after {measured.enrolled_seconds:.0f} s, first update recorded after "
                f"{measured.first_update_seconds:.0f} s"
            )
            for number in range(1, cuts + 1):
                if number > 1:
                    machine.until('"recorded": true')
                where = _in_training if number % 2 else _in_upload
                where(machine, scene)
                _note(measured, machine)
                machine.cut()
                scene.relay.renew()
                measured.cuts += 1
                log(f"{board}: power cut {number}, {where.__doc__}")
                machine = pi.power()
                measured.again_seconds.append(machine.until(f"{DEVICE}: joining")[0])
            # The round that the last cut fell into, and one more; what it was told last is on its card.
            for _ in range(rounds - max(cuts, 1)):
                machine.until('"recorded": true')
            scene.finished()
        finally:
            machine.cut()
        _note(measured, machine)
        _settle(measured, scene.account(pi.journal()))
    log(f"{board}: {json.dumps(asdict(measured))}")
    return measured


def wrong_claim(board: str, image: Path, bundle: Path, folder: Path) -> str:
    """What the console says where a card has a claim with which another device has enrolled."""
    with closing(Scene(folder / "host", bundle, 1, 1)) as scene:
        pi = Pi(board, image, folder / "pi", scene.relay.port)
        pi.fill(scene.card(scene.used_claim()), None)
        with pi.power() as machine:
            return machine.until("NOT ENROLLED", "is enrolled")[1]


def _in_training(machine: Machine, scene: Scene) -> None:
    """while it trained"""
    machine.until('"what": "began"')
    before = _cpu(machine)
    # It has worked for some seconds, and has made nothing of it yet.
    while _cpu(machine) < before + 2.0:
        pass
    assert '"what": "made"' not in machine.lines[-1][1]


def _in_upload(machine: Machine, scene: Scene) -> None:
    """while it uploaded"""
    machine.until('"what": "began"')
    scene.relay.stop_after(_UP)
    machine.until('"what": "made"')
    assert scene.relay.stopped(120.0), "the upload has fewer bytes than were to get through"


def _cpu(machine: Machine) -> float:
    found = _PROBE.search(machine.until("probe: ")[1])
    assert found is not None
    return float(found[3])


def _note(measured: Measured, machine: Machine) -> None:
    found = [_PROBE.search(line) for line in machine.said("probe: ")]
    measured.client_rss_mib = max([measured.client_rss_mib, *(float(one[2]) for one in found if one)])


def _settle(measured: Measured, account: Account) -> None:
    measured.updates_accepted, measured.wrong = account.recorded, account.wrong
    measured.lost, measured.doubled = len(account.lost), len(account.doubled)
