"""Attacks on the gate: a real broker, with the configuration that is generated for it."""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls
from tests.attacks.outcome import Outcome
from tests.brokers import FEDERATION, Secured, secured
from tests.certificates import Certificates
from tests.flood import connection, encoded

TOP = f"fedge/{FEDERATION}"
MOST = 32_000_000
"""Bytes that a message which is too large may cost the broker."""
GIVEN_UP = 15.0
"""Seconds after which nobody goes on with a message that is still being read."""
LARGEST = 268_435_455
"""Bytes of the largest message that MQTT can name; who says that much goes on until 300 MB are sent."""


def quick(kind: str, folder: Path) -> Iterator[Outcome]:
    """Every attack on a gate that takes no time, on a broker of its own."""
    with secured(kind, folder, ("pi-7", "pi-8", "gone")) as broker:
        pi7, pi8 = broker.certificates.device("pi-7"), broker.certificates.device("pi-8")
        yield without_certificate(broker)
        yield of_another_authority(broker, folder / "other")
        yield writing_for_another(broker, pi7)
        yield reading_for_another(broker, pi7, pi8)
        yield revoked(broker)


def without_certificate(broker: Secured) -> Outcome:
    """Connect with nothing to show."""
    return _connecting("no certificate", broker, Tls(broker.certificates.folder / "ca.crt"))


def of_another_authority(broker: Secured, folder: Path) -> Outcome:
    """Connect with a certificate in a device's name that somebody else has made."""
    own = Certificates(folder).device("pi-7")
    shown = Tls(broker.certificates.folder / "ca.crt", own / "device.crt", own / "device.key")
    return _connecting("a certificate of another authority", broker, shown)


def revoked(broker: Secured) -> Outcome:
    """Connect again with a certificate that was revoked meanwhile."""
    identity = broker.certificates.device("gone")
    with broker.peer(identity):
        broker.certificates.revoke(identity / "device.crt")
        broker.reload("pi-7", "pi-8", revoked=("gone",))
    return _connecting("a revoked device that connects again", broker, Tls.of(identity))


def writing_for_another(broker: Secured, identity: Path) -> Outcome:
    """Say something as another device, as the server and as the enrolment."""
    forged = [f"{TOP}/{end}" for end in ("up/pi-8/msg", "down/pi-8/msg", "pub/offer", "enrol/pi-8/told")]
    with broker.server() as server, broker.peer(identity) as device:
        server.subscribe([f"{TOP}/#"])
        for topic in forged:
            device.publish(topic, b"forged", retain=True)
        device.publish(f"{TOP}/up/pi-7/msg", b"own")
        heard = _heard(server, b"own")
    through = [topic for topic in heard if topic in forged]
    said = f"pi-7 wrote to {', '.join(forged)} and its own topic; all that came: {', '.join(heard)}"
    return Outcome("writing on another device's topic", not through, _name(broker), said)


def reading_for_another(broker: Secured, identity: Path, other: Path) -> Outcome:
    """Listen to what another device says and is told."""
    wanted = ["#", f"{TOP}/#", f"{TOP}/up/#", f"{TOP}/down/pi-8/msg", f"{TOP}/up/pi-8/msg"]
    with broker.server() as server, broker.peer(identity) as spy, broker.peer(other) as device:
        server.subscribe([f"{TOP}/up/#"])
        spy.subscribe([f"{TOP}/down/pi-7/msg"])
        for topic in wanted:
            spy.subscribe([topic])
        device.publish(f"{TOP}/up/pi-8/msg", b"secret")
        _heard(server, b"secret")
        server.publish(f"{TOP}/down/pi-8/msg", b"secret")
        server.publish(f"{TOP}/down/pi-7/msg", b"mark")
        heard = _heard(spy, b"mark")
    through = [topic for topic in heard if "pi-8" in topic]
    said = f"pi-7 subscribed to {', '.join(wanted)}; all that it heard: {', '.join(heard)}"
    return Outcome("reading another device's topic", not through, _name(broker), said)


def of_300_mb(broker: Secured) -> Outcome:
    """Send the largest message that can be named, and more, with the broker's memory in view."""
    pi7, pi8 = broker.certificates.device("pi-7"), broker.certificates.device("pi-8")
    process, topic = psutil.Process(broker.process.pid), f"{TOP}/up/pi-7/msg".encode()
    with broker.server() as server, broker.peer(pi8) as other:
        server.subscribe([f"{TOP}/up/#"])
        before = most = process.memory_info().rss
        sent, began, why = 0, time.monotonic(), "nothing stopped it"
        with connection(Tls.of(pi7).context(), broker.address.port) as raw:
            raw.sendall(b"\x30" + encoded(LARGEST) + len(topic).to_bytes(2, "big") + topic)
            try:
                while sent < 300_000_000 and time.monotonic() < began + GIVEN_UP:
                    sent += raw.send(bytes(65_536))
                    most = max(most, process.memory_info().rss)
            except OSError as error:
                why = f"the connection was ended: {error}"
        other.publish(f"{TOP}/up/pi-8/msg", b"alive")
        heard = _heard(server, b"alive")
    cost = most - before
    said = (
        f"{sent / 1e6:.1f} MB were sent: {why}; the broker took {cost / 1e6:.1f} MB; all that came: {', '.join(heard)}"
    )
    return Outcome("a message of 300 MB", cost < MOST and len(heard) == 1, _name(broker), said)


def _connecting(attack: str, broker: Secured, tls: Tls) -> Outcome:
    try:
        with Peer(broker.address, f"attack-{time.monotonic_ns():x}", tls=tls):
            return Outcome(attack, False, _name(broker), "it was let in")
    except TransportError as error:
        return Outcome(attack, True, _name(broker), str(error))


def _heard(peer: Peer, until: bytes) -> list[str]:
    """The topics of all that comes up to a message, and of what comes at once after it."""
    found = []
    while messages := peer.take(1, 10.0):
        found.append(messages[0])
        if messages[0].payload == until:
            return [one.topic for one in (*found, *peer.take(9, 0.3))]
    raise AssertionError(f"{until!r} did not come, but {found}")


def _name(broker: Secured) -> str:
    return f"broker: {broker.kind}"
