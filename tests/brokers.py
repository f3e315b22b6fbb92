"""Real brokers on loopback, started from the folders that `fedge broker config` writes."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from broker_server.broker_config import mosquitto, nats
from broker_server.broker_config.programs import find
from broker_server.broker_config.reload import reload
from broker_server.broker_config.spec import BrokerSpec
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls
from tests.certificates import Certificates
from tests.nats import PROGRAM as NATS
from tests.nats import free_ports

FEDERATION = "fleet"
ON_MOSQUITTO = pytest.param(
    "mosquitto", marks=pytest.mark.skipif(find("mosquitto") is None, reason="needs the Debian package mosquitto")
)
ON_NATS = pytest.param("nats", marks=pytest.mark.skipif(NATS is None, reason="needs the Debian package nats-server"))
KINDS = [ON_MOSQUITTO, ON_NATS]


Result = TypeVar("Result")
_RELOADED = "Reloading config."


@dataclass
class Secured:
    """A broker that asks for certificates, and the authority that makes them."""

    kind: str
    path: Path
    """Of its configuration."""
    address: Address
    client_port: int
    """Of NATS's own protocol."""
    certificates: Certificates
    process: "subprocess.Popen[bytes]" = field(init=False)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def peer(self, identity: Path, name: str = "", *, file: str = "device", **how: object) -> Peer:
        """A connection of its own name, made with the certificate in a folder."""
        return Peer(self.address, name or f"test-{time.monotonic_ns():x}", tls=Tls.of(identity, file), **how)

    def server(self) -> Peer:
        return self.peer(self.certificates.folder, file="server")

    def start(self) -> None:
        program = find("mosquitto") if self.kind == "mosquitto" else NATS
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen([program, "-c", self.path], stdout=log, stderr=log)
        _answers(self)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def reload(self, *devices: str, revoked: tuple[str, ...] = ()) -> str:
        """Let the broker know who is enrolled and who is not; when this returns, it does."""
        if self.kind == "nats":
            said = reload(self.folder, devices=devices, revoked=revoked)
            self.stop()
            self.start()
            return said
        return self.rules(lambda: reload(self.folder, devices=devices, revoked=revoked))

    def rules(self, change: Callable[[], Result]) -> Result:
        """Do what makes mosquitto read its rules again; when this returns, it has."""
        before = self.log.count(_RELOADED)
        said = change()
        deadline = time.monotonic() + 10
        while self.log.count(_RELOADED) == before:
            assert time.monotonic() < deadline, self.log[-2000:]
            time.sleep(0.01)
        return said


@contextmanager
def secured(kind: str, folder: Path, devices: tuple[str, ...] = ()) -> Iterator[Secured]:
    """A broker with a folder of its own, made by ``certificates`` that are in ``folder`` too."""
    certificates = Certificates(folder / "authority")
    port, client_port = free_ports(2)
    spec = BrokerSpec(FEDERATION, certificates.folder, host="127.0.0.1", port=port, devices=devices)
    place = folder / "broker"
    path = mosquitto.write(place, spec, "2.0") if kind == "mosquitto" else nats.write(place, spec, client_port)
    running = Secured(kind, path, Address("127.0.0.1", port, tls=True), client_port, certificates)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(place / "store", ignore_errors=True)


def _answers(running: Secured) -> None:
    deadline, topic = time.monotonic() + 30, f"fedge/{FEDERATION}/probe/ready"
    while time.monotonic() < deadline and running.process.poll() is None:
        with suppress(TransportError), running.server() as peer:
            if peer.subscribe([topic]) == [True] and peer.publish(topic, b"yes") is not None:
                return
        time.sleep(0.05)
    raise AssertionError(running.log[-3000:])
