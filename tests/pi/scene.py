"""What is on the host: an authority, a mosquitto with the generated configuration, a server, and the line to the Pi."""

import asyncio
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from broker_server.authority import Authority
from broker_server.broker import EmbeddedBroker
from broker_server.broker_config.spec import BrokerSpec
from deploy.flash.boot import folder as boot_folder
from deploy.flash.settings import CardSettings
from edge_client.bundle import Bundle
from edge_client.trust.claim import Claim
from edge_client.trust.enrol import enroll
from tests.federation import claims
from tests.kills.account import Account, settle
from tests.kills.run import Life
from tests.pi.machine import BROKER
from tests.pi.relay import Relay

ROOT = Path(__file__).parents[2]
NAME, DEVICE = "digits", "pi-7"
SAMPLES, BATCH = 640, 16
"""Of the device, and in a step; a round has at least as many steps as go through all of them."""
URL = f"mqtts://{BROKER[0]}:{BROKER[1]}"
_ROUND = re.compile(r"round ([0-9]+) · ")
_TOML = """\
[federation]
name = "{name}"
bundle = "digits.fedge"
[trust]
authority = "authority"
[broker]
url = "{url}"
[round]
cohort = 1
deadline = 900.0
[train]
steps = {steps}
batch_size = {batch}
[train.hypers]
lr = 0.1
[codec]
target = "bits"
value = 4.0
[transfer]
inline = 0
chunk = {chunk}
spread = 0.2
[evaluation]
data = "test.npz"
[stop]
rounds = {rounds}
"""


class Scene:
    """Everything that a Pi takes part in; in ``folder``, which stays."""

    def __init__(self, folder: Path, bundle: Path, rounds: int, steps: int, *, chunk: int = 1024) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._stack = ExitStack()
        self.authority = Authority.init(folder / "authority", NAME, ["localhost", BROKER[0]], now=time.time())
        (folder / "digits.fedge").write_bytes(bundle.read_bytes())
        _write_digits(folder)
        spec = BrokerSpec(NAME, self.authority.folder)
        broker = EmbeddedBroker.start(folder / "broker", kind="mosquitto", host="127.0.0.1", spec=spec)
        self._stack.enter_context(broker)
        self._url = url = broker.url.replace("127.0.0.1", "localhost")
        (folder / "federation.toml").write_text(
            _TOML.format(name=NAME, url=url, steps=steps, batch=BATCH, rounds=rounds, chunk=chunk)
        )
        self.relay = Relay(int(broker.url.rpartition(":")[2]))
        self._stack.callback(self.relay.close)
        self._news = threading.Condition()
        self.said: list[str] = []
        self.server = Life(folder / "server.log", ["serve", folder / "federation.toml"], self._hear)
        self._stack.callback(self._end)

    def card(self, claim: bytes | None = None) -> dict[str, bytes]:
        """The files for the boot partition of a card for `DEVICE`, as `fedge flash` writes them."""
        if claim is None:
            claim = self.claim()
        settings = CardSettings(DEVICE, f"{URL}/{NAME}", claim=claim)
        files = boot_folder(settings, now=time.time())
        return {
            name.partition("/")[2]: data if isinstance(data, bytes) else data.read_bytes()
            for name, data in files.items()
        }

    def claim(self) -> bytes:
        """A new claim."""
        (made,) = claims(self.authority, URL)
        return self._saved(made)

    def used_claim(self) -> bytes:
        """One with which another device has enrolled, here on the host."""
        (made,) = claims(self.authority, self._url)
        asyncio.run(enroll(made, "pi-8", self.folder / "pi-8", self.said.append, patience=60.0))
        # The same for who is on the other side of the line.
        return self._saved(msgspec.structs.replace(made, broker=URL).signed(self.authority.signing.sign))

    def _saved(self, made: Claim) -> bytes:
        path = self.folder / f"{made.user[1:]}.fedgeclaim"
        made.save(path)
        return path.read_bytes()

    def rounds(self) -> int:
        """Rounds that are finished."""
        return max((int(found[1]) for line in self.said if (found := _ROUND.match(line))), default=0)

    def reach(self, number: int, seconds: float = 600.0) -> None:
        """Wait until a round is finished."""
        with self._news:
            there = self._news.wait_for(lambda: self.rounds() >= number, seconds)
        assert there, f"round {number} is not finished after {seconds:g} s: {self.said[-5:]}; see {self.folder}"

    def account(self, journal: Path) -> Account:
        """What came of it, with the journal that the device kept."""
        bundle = Bundle.open(self.folder / "digits.fedge")
        return settle(bundle, self.folder / "state" / "ledger.db", {DEVICE: journal}, {DEVICE: SAMPLES})

    def finished(self, seconds: float = 120.0) -> None:
        """Wait until the server has ended by itself."""
        status = self.server.ends(seconds)
        assert status == 0, f"the server ends with status {status}; see {self.folder}"

    def close(self) -> None:
        """Leave no process behind."""
        self._stack.close()

    def _hear(self, line: str) -> None:
        with self._news:
            self.said.append(line.rstrip())
            self._news.notify_all()

    def _end(self) -> None:
        if self.server.process.poll() is None:
            self.server.kill()


def export_digits(path: Path) -> None:
    """The digits CNN, by the command."""
    command = [sys.executable, "-m", "edge_client.cli", "export", "export.models.digits:digits_cnn"]
    command += ["--input", "1,8,8", "--scale", str(1 / 16), "--loss", "cross_entropy", "--optimizer", "sgd"]
    subprocess.run([*command, "--no-tune", "-o", str(path)], check=True, cwd=ROOT)


def _write_digits(folder: Path) -> None:
    """scikit-learn's digits: what the server measures with, and what the device has."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[:, None], digits.target.astype(np.int64)
    cut, end = 360, 360 + SAMPLES
    np.savez(folder / "test.npz", x=images[:cut], y=labels[:cut])
    np.savez(folder / "digits.npz", x=images[cut:end], y=labels[cut:end])
