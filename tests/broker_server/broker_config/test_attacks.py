"""What real brokers with generated configuration refuse, and how a client learns why."""

import asyncio
import contextlib
import json
import socket

import msgspec
import psutil
import pytest

from broker_server.broker_config.reload import mute
from broker_server.config import Federation
from broker_server.connection import server_link
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls
from tests.brokers import FEDERATION, KINDS, ON_MOSQUITTO, ON_NATS, secured
from tests.certificates import Certificates
from tests.flood import connection, encoded

TOP = f"fedge/{FEDERATION}"
QUIET = 0.3
"""Seconds in which a message that comes at all has come: one that was sent later has."""


@pytest.fixture(scope="module", params=KINDS)
def broker(request, tmp_path_factory):
    with secured(request.param, tmp_path_factory.mktemp(request.param), ("pi-7", "pi-8", "gone")) as running:
        running.pi7, running.pi8 = running.certificates.device("pi-7"), running.certificates.device("pi-8")
        running.claim = running.certificates.device("@claim")
        yield running


def heard(peer, until):
    """All that a peer hears, up to a message with this payload."""
    found = []
    while not found or found[-1][1] != until:
        messages = peer.take(1, 5.0)
        assert messages, f"{until} did not come, but {found}"
        found.append((messages[0].topic, messages[0].payload))
    return found


def test_devices_and_server_reach_each_other(broker):
    with broker.server() as server, broker.peer(broker.pi7) as device:
        assert server.subscribe([f"{TOP}/up/#"]) == [True]
        assert device.subscribe([f"{TOP}/pub/offer", f"{TOP}/down/pi-7/msg"]) == [True, True]
        device.publish(f"{TOP}/up/pi-7/msg", b"hello")
        assert heard(server, b"hello") == [(f"{TOP}/up/pi-7/msg", b"hello")]
        server.publish(f"{TOP}/pub/offer", b"offer", retain=True)
        server.publish(f"{TOP}/down/pi-7/msg", b"invitation")
        assert len(heard(device, b"invitation")) == 2
    with broker.peer(broker.pi8) as late:
        late.subscribe([f"{TOP}/pub/offer"])
        assert heard(late, b"offer")


def test_no_certificate(broker):
    reason = r"asks for a certificate|refuses this certificate: none"
    with (
        pytest.raises(TransportError, match=reason),
        Peer(broker.address, "nobody", tls=Tls(broker.certificates.folder / "ca.crt")),
    ):
        pass


def test_a_certificate_of_another_authority(broker, tmp_path):
    folder = Certificates(tmp_path / "other").device("pi-7")
    stranger = Tls(broker.certificates.folder / "ca.crt", folder / "device.crt", folder / "device.key")
    with (
        pytest.raises(TransportError, match=r"refuses this certificate: .*of another authority"),
        Peer(broker.address, "stranger", tls=stranger),
    ):
        pass


def test_no_tls(broker):
    with pytest.raises(TransportError, match=r"ended|reset|no answer"):
        Peer(Address("127.0.0.1", broker.address.port), "plain").__enter__()


def test_writing_what_another_writes(broker):
    with broker.server() as server, broker.peer(broker.pi7) as device:
        server.subscribe([f"{TOP}/#"])
        for topic in ("up/pi-8/msg", "down/pi-8/msg", "pub/offer", "enrol/pi-7/told", "enrol/pi-8/ask"):
            device.publish(f"{TOP}/{topic}", b"forged", retain=True)
        device.publish("outside", b"forged")
        device.publish(f"{TOP}/up/pi-7/msg", b"own")
        came = heard(server, b"own")
    assert not [topic for topic, payload in came if payload == b"forged"]


def test_a_last_will_in_anothers_name(broker):
    with broker.server() as server, broker.peer(broker.pi8) as marker:
        server.subscribe([f"{TOP}/up/#"])
        for target, payload in (("pi-8", b"forged"), ("pi-7", b"own")):
            device = broker.peer(broker.pi7)
            device._client.will_set(f"{TOP}/up/{target}/msg", payload, 1)
            with device:
                device.cut()
        came = heard(server, b"own")
        marker.publish(f"{TOP}/up/pi-8/msg", b"end")
        came += heard(server, b"end")
    assert b"forged" not in {payload for _, payload in came}


FILTERS = ("#", "fedge/#", "+/+/+/+/+", "$SYS/#", "$MQTT/#", "$MQTT/sub/#")
BELOW = ("#", "up/#", "up/pi-8/msg", "+/+/msg", "down/#", "down/pi-8/#", "enrol/#")


@pytest.mark.parametrize("topic", [*FILTERS, *(f"{TOP}/{topic}" for topic in BELOW), f"$share/x/{TOP}/up/#"])
def test_reading_what_is_for_others(broker, topic):
    with broker.server() as server, broker.peer(broker.pi7) as spy, broker.peer(broker.pi8) as device:
        server.subscribe([f"{TOP}/up/#"])
        spy.subscribe([f"{TOP}/down/pi-7/msg"])
        spy.subscribe([topic])
        device.publish(f"{TOP}/up/pi-8/msg", b"secret")
        heard(server, b"secret")
        server.publish(f"{TOP}/down/pi-8/msg", b"secret")
        server.publish(f"{TOP}/enrol/pi-8/told", b"secret")
        server.publish(f"{TOP}/down/pi-7/msg", b"mark")
        came = heard(spy, b"mark") + [(one.topic, one.payload) for one in spy.take(9, QUIET)]
    assert {topic for topic, _ in came} <= {f"{TOP}/down/pi-7/msg", f"{TOP}/pub/offer"}, came


def test_a_claim_enrols_and_does_nothing_else(broker):
    ask, told = f"{TOP}/enrol/@claim-1a2b3c4d/ask", f"{TOP}/enrol/@claim-1a2b3c4d/told"
    with broker.peer(broker.certificates.folder, file="enrol") as office, broker.server() as server:
        assert office.subscribe([f"{TOP}/enrol/+/ask"]) == [True]
        server.subscribe([f"{TOP}/up/#", f"{TOP}/pub/#"])
        server.publish(f"{TOP}/pub/model", b"secret", retain=True)
        with broker.peer(broker.claim) as claim:
            claim.subscribe([told])
            for topic in (f"{TOP}/pub/#", f"{TOP}/pub/model", f"{TOP}/down/#", f"{TOP}/up/#", f"{TOP}/down/@claim/#"):
                claim.subscribe([topic])
            for topic in (f"{TOP}/up/@claim/msg", f"{TOP}/up/pi-7/msg", f"{TOP}/pub/model", told):
                claim.publish(topic, b"forged")
            claim.publish(ask, b"please")
            assert heard(office, b"please") == [(ask, b"please")]
            office.publish(f"{TOP}/pub/model", b"forged")
            office.publish(told, b"certificate")
            assert heard(claim, b"certificate") == [(told, b"certificate")]
            assert claim.take(9, QUIET) == []
        server.publish(f"{TOP}/pub/model", b"mark")
        assert b"forged" not in {payload for _, payload in heard(server, b"mark")}
        server.publish(f"{TOP}/pub/model", b"", retain=True)


def test_a_revoked_device_is_cut_off_and_does_not_come_back(broker):
    identity = broker.certificates.device("gone")
    with broker.peer(identity) as device:
        device.subscribe([f"{TOP}/pub/#"])
        broker.certificates.revoke(identity / "device.crt")
        said = broker.reload("pi-7", "pi-8", revoked=("gone",))
        assert ("start it anew" if broker.kind == "nats" else "reads its rules again") in said
        with broker.server() as server, broker.peer(broker.pi8) as other:
            server.subscribe([f"{TOP}/up/#"])
            other.subscribe([f"{TOP}/pub/#"])
            # mosquitto keeps the connection, and gives it nothing any more.
            device.send(f"{TOP}/up/gone/msg", b"still here")
            server.publish(f"{TOP}/pub/news", b"news")
            assert heard(other, b"news")
            other.publish(f"{TOP}/up/pi-8/msg", b"mark")
            assert heard(server, b"mark") == [(f"{TOP}/up/pi-8/msg", b"mark")]
            assert b"news" not in {one.payload for one in device.take(9, QUIET)}
    reason = r"it is revoked|refuses this certificate|Not authorized"
    with pytest.raises(TransportError, match=reason), broker.peer(identity):
        pass
    with broker.peer(broker.pi7):
        pass


# NATS is started anew, which ends everybody's connections.
@pytest.mark.parametrize("broker", [ON_MOSQUITTO], indirect=True)
def test_a_revocation_leaves_the_connections_of_the_others_alone(broker):
    identity = broker.certificates.device("gone")
    with broker.server() as server, broker.peer(broker.pi8) as other:
        server.subscribe([f"{TOP}/up/#"])
        broker.certificates.revoke(identity / "device.crt")
        broker.reload("pi-7", "pi-8", revoked=("gone",))
        other.publish(f"{TOP}/up/pi-8/msg", b"mark")
        assert heard(server, b"mark") == [(f"{TOP}/up/pi-8/msg", b"mark")]


# NATS cannot be told.
@pytest.mark.parametrize("broker", [ON_MOSQUITTO], indirect=True)
def test_a_muted_device_says_nothing_and_hears_all_until_it_is_heard_again(broker):
    with broker.server() as server, broker.peer(broker.pi7) as device, broker.peer(broker.pi8) as other:
        server.subscribe([f"{TOP}/up/#"])
        device.subscribe([f"{TOP}/down/pi-7/msg"])
        broker.rules(lambda: mute(broker.certificates.folder, ("pi-7",)))
        device.publish(f"{TOP}/up/pi-7/msg", b"flood")
        other.publish(f"{TOP}/up/pi-8/msg", b"mark")
        assert heard(server, b"mark") == [(f"{TOP}/up/pi-8/msg", b"mark")]
        server.publish(f"{TOP}/down/pi-7/msg", b"receipt")
        assert heard(device, b"receipt")
        # Who is enrolled and who is revoked changes meanwhile, and changes nothing of it.
        broker.reload("pi-7", "pi-8")
        device.publish(f"{TOP}/up/pi-7/msg", b"flood")
        broker.rules(lambda: mute(broker.certificates.folder, ()))
        device.publish(f"{TOP}/up/pi-7/msg", b"own")
        assert heard(server, b"own") == [(f"{TOP}/up/pi-7/msg", b"own")]


@contextlib.contextmanager
def oversized(broker, length):
    """A connection of pi-7's on which the first bytes of a message of ``length`` have been sent."""
    topic = f"{TOP}/up/pi-7/msg".encode()
    with connection(Tls.of(broker.pi7).context(), broker.address.port) as raw:
        raw.sendall(b"\x30" + encoded(length) + len(topic).to_bytes(2, "big") + topic)
        yield raw


def flood(raw, most):
    """Send until the other side has had enough, or ``most`` bytes; how many went."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < most:
            sent += raw.send(bytes(65_536))
    return sent


# NATS 2.9.10 reads a message whole, and then looks at its limit: `make bench-attacks` reports that.
@pytest.mark.parametrize("broker", [ON_MOSQUITTO], indirect=True)
def test_a_message_of_300_mb_is_cut_off_before_it_costs_memory(broker):
    """MQTT's own limit is 256 MiB: what sends more says that much, and goes on."""
    process = psutil.Process(broker.process.pid)
    with broker.server() as server, broker.peer(broker.pi8) as other:
        server.subscribe([f"{TOP}/up/#"])
        before = process.memory_info().rss
        with oversized(broker, 268_435_455) as raw:
            assert flood(raw, 300_000_000) < 32_000_000
            assert process.memory_info().rss - before < 32_000_000
        other.publish(f"{TOP}/up/pi-8/msg", b"alive")
        assert heard(server, b"alive") == [(f"{TOP}/up/pi-8/msg", b"alive")]


def test_a_message_over_the_limit_goes_nowhere(broker):
    with broker.server() as server, broker.peer(broker.pi8) as other:
        server.subscribe([f"{TOP}/up/#"])
        with oversized(broker, 3_000_000) as raw:
            flood(raw, 3_000_000)
            other.publish(f"{TOP}/up/pi-8/msg", b"alive")
            assert heard(server, b"alive") == [(f"{TOP}/up/pi-8/msg", b"alive")]


def test_the_largest_chunk_passes(broker):
    with broker.server() as server, broker.peer(broker.pi7) as device:
        server.subscribe([f"{TOP}/up/#"])
        device.publish(f"{TOP}/up/pi-7/msg", bytes(1_048_576 + 1024))
        assert len(server.take(1, 10.0)[0].payload) == 1_048_576 + 1024


class Watch:
    """A handler that counts."""

    def __init__(self):
        self.up, self.losses = asyncio.Event(), []

    def connected(self):
        self.up.set()

    def disconnected(self, reason):
        self.losses.append(reason)

    def message(self, topic, payload):
        raise AssertionError(topic)


def test_nobody_ends_anothers_connection_by_taking_its_name(broker):
    settings = msgspec.convert({"federation": {"name": FEDERATION, "bundle": "b"}}, Federation)

    async def play():
        link = server_link(settings, broker.address, tls=Tls.of(broker.certificates.folder, "server"))
        watch = Watch()
        life = asyncio.ensure_future(link.run(watch))
        await asyncio.wait_for(watch.up.wait(), 10)

        def take() -> None:
            with broker.peer(broker.pi7, f"fedge-{FEDERATION}-server") as thief:
                thief.publish(f"{TOP}/up/pi-7/msg", b"here")

        await asyncio.to_thread(take)
        assert watch.losses == []
        await link.close()
        await life

    asyncio.run(play())


# mosquitto has one protocol.
@pytest.mark.parametrize("broker", [ON_NATS], indirect=True)
def test_natss_own_protocol_is_for_none_of_the_users(broker):
    context = Tls.of(broker.certificates.folder, "server").context()
    with socket.create_connection(("127.0.0.1", broker.client_port)) as plain:
        plain.settimeout(5)
        info = json.loads(plain.recv(4096).removeprefix(b"INFO "))
        assert info["tls_required"]
        assert info["tls_verify"]
        with context.wrap_socket(plain, server_hostname="localhost") as raw:
            raw.sendall(b'CONNECT {"verbose":true,"pedantic":false}\r\nSUB fedge.> 1\r\nPING\r\n')
            said = b""
            with contextlib.suppress(OSError):
                while data := raw.recv(4096):
                    said += data
    assert b"PONG" not in said
    assert b"Authorization Violation" in said
