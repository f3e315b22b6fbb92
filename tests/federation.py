"""A federation that asks for certificates, as its operator runs it: commands, real mosquitto, enrolled devices."""

import contextlib
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from broker_server import authority_cli
from broker_server.authority import Authority
from broker_server.broker import EmbeddedBroker
from broker_server.broker_config.spec import BrokerSpec
from broker_server.registry import DeviceRow, Registry
from edge_client.enroll_cli import enroll as enroll_command
from edge_client.errors import FedgeError
from edge_client.trust.certificate import make_request
from edge_client.trust.claim import Claim
from edge_client.trust.identity import Identity, prepare, store
from tests.toy import toy_bundle, toy_data

ROOT = Path(__file__).parents[1]
NAME = "toys"
PATIENCE = 120.0
"""Seconds for a command to say what is waited for, on a machine that is busy."""
TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"
[trust]
authority = "authority"
[broker]
url = "{url}"
[round]
cohort = {cohort}
{more}
[stop]
rounds = {rounds}
"""
COMMANDS = {
    one.name: one
    for one in (authority_cli.ca, authority_cli.claim, authority_cli.approve, authority_cli.revoke, enroll_command)
}


def fedge(*arguments: object) -> str:
    """Run a command in this process: what it prints, or the mistake that it names."""
    name, *rest = map(str, arguments)
    done = CliRunner().invoke(COMMANDS[name], rest)
    if isinstance(done.exception, FedgeError):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


class Running:
    """A command that runs, with what it has said so far."""

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        # From the root of this tree, so that it is this one which runs.
        command = [sys.executable, "-m", "edge_client.cli", *map(str, arguments)]
        own = os.environ | (environment or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=own)
        self.lines: list[str] = []
        self._coming: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def heard(self, words: str, seconds: float = PATIENCE) -> str | None:
        """The next line that has these words; None where none comes in time, or the command ends before it."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while (line := self._coming.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                self.lines.append(line)
                if words in line:
                    return line
            self._coming.put(None)
        return None

    def drain(self) -> None:
        """Take what was said up to now as read."""
        with contextlib.suppress(queue.Empty):
            while (line := self._coming.get_nowait()) is not None:
                self.lines.append(line)
            self._coming.put(None)

    def until(self, words: str) -> str:
        """Read on until a line has these words."""
        line = self.heard(words)
        assert line is not None, f"{words!r} was not said: {self.lines}"
        return line

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._coming.put(line.rstrip())
        self._coming.put(None)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Serving(Running):
    """`fedge serve` in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("serve", folder / "federation.toml")


class Joining(Running):
    """`fedge join` of an enrolled device, with its state in a folder of its name; a ``gate`` keeps its first batch."""

    def __init__(self, folder: Path, url: str, client: str, *, gate: Path | None = None) -> None:
        data = folder / f"{client}.npz"
        np.savez(data, **toy_data(60, seed=len(client)))
        more = {} if gate is None else {"FEDGE_GATE": str(gate), "FEDGE_GATE_DATA": str(data)}
        source = data if gate is None else "tests.gate:gated"
        who = ("--id", client, "--data", source, "--state", folder / client)
        super().__init__("join", f"{url}/{NAME}", *who, environment=more)


def enrolled(authority: Authority, folder: Path, client: str, issued: float) -> Identity:
    """A device that was enrolled at some time, for 30 days."""
    certificate = authority.issue(make_request(prepare(folder), client), client, 30.0, now=issued)
    with Registry.open(authority.folder / "registry.db") as registry:
        registry.certify(
            DeviceRow(
                certificate.serial, client, certificate.public, certificate.der, issued, certificate.expires, None
            )
        )
    return store(folder, certificate, authority.certificate, authority.pins, issued)


def all_enrolled(authority: Authority, folder: Path, *names: str) -> dict[str, Identity]:
    """Devices that were enrolled just now, each with its identity where `Joining` looks for it."""
    return {name: enrolled(authority, folder / name / "identity", name, time.time()) for name in names}


def claims(authority: Authority, url: str, *, count: int = 1, seconds: float = 86_400.0) -> list[Claim]:
    """Claims that `fedge claim` would have made, valid for so many seconds from now."""
    now = time.time()
    made = authority.claims(count, seconds, url, now=now)
    with Registry.open(authority.folder / "registry.db") as registry:
        registry.add_claims(((one.user, cert.public, cert.serial, one.expires) for one, cert in made), now)
    return [one for one, _ in made]


@contextlib.contextmanager
def federation(
    folder: Path, rounds: int = 3, cohort: int = 1, more: str = "", bundle: bytes | None = None
) -> Iterator[tuple[Authority, str]]:
    """An authority, its broker, and a federation file that names both; ``more`` lines follow those of its rounds."""
    authority = Authority.init(folder / "authority", NAME, ["localhost"], now=time.time())
    (folder / "toy.fedge").write_bytes(bundle or toy_bundle())
    spec = BrokerSpec(NAME, authority.folder)
    with EmbeddedBroker.start(folder / "broker", kind="mosquitto", host="127.0.0.1", spec=spec) as broker:
        url = broker.url.replace("127.0.0.1", "localhost")
        told = TOML.format(url=url, rounds=rounds, cohort=cohort, more=more)
        (folder / "federation.toml").write_text(told)
        yield authority, url


def misconduct(folder: Path) -> list[tuple[str, str, str]]:
    """Client, kind and reason of each row that the ledger has."""
    with contextlib.closing(sqlite3.connect(folder / "state" / "ledger.db")) as ledger:
        return list(ledger.execute("SELECT client, kind, reason FROM misconduct"))
