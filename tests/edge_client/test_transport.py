"""Links over real sockets and brokers, and the twin in memory: one table of scenarios, the same sequences."""

import asyncio
import contextlib
import socket
import ssl

import msgspec
import pytest

from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.config import Federation
from broker_server.connection import server_link
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.transport import MqttLink
from tests.certificates import Certificates

MOSQUITTO = pytest.param(
    "mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
)
KINDS = [MOSQUITTO, "amqtt"]


class Recorder:
    """A handler that keeps what it is told, to be waited for."""

    def __init__(self, link=None, topics=()):
        self.events = []
        self.link, self.topics = link, topics
        self._news = asyncio.Event()

    def _tell(self, *event):
        self.events.append(event)
        self._news.set()

    def connected(self):
        if self.topics:
            self.link.subscribe(self.topics)
        self._tell("connected")

    def disconnected(self, reason):
        self._tell("disconnected", reason)

    def message(self, topic, payload):
        self._tell(topic, payload)

    async def until(self, wanted, seconds=10.0):
        async with asyncio.timeout(seconds):
            while not wanted(self.events):
                self._news.clear()
                await self._news.wait()

    async def heard(self, *event, times=1):
        await self.until(lambda events: events.count(event) >= times)

    @property
    def messages(self):
        return [event for event in self.events if event[0] not in ("connected", "disconnected")]


@contextlib.asynccontextmanager
async def running(link, recorder):
    life = asyncio.ensure_future(link.run(recorder))
    try:
        await recorder.heard("connected")
        yield life
    finally:
        await link.close()
        await asyncio.wait_for(life, 10)


@pytest.fixture(scope="module", params=KINDS)
def broker(request, tmp_path_factory):
    with EmbeddedBroker.start(tmp_path_factory.mktemp("broker"), kind=request.param) as found:
        yield found


@pytest.fixture(params=["memory", *KINDS])
def network(request, tmp_path):
    """Makes links, to one broker of each kind."""
    if request.param == "memory":
        inner = MemoryBroker()
        yield lambda name, will=None: MemoryLink(inner, will=will)
        return
    with EmbeddedBroker.start(tmp_path, kind=request.param) as found:
        yield lambda name, will=None: MqttLink(Address.parse(found.url), name, will, slowest=0.1)


async def plain(a, b, said, heard):
    a.publish("t/1", b"one")
    a.publish("t/2", b"two")
    await heard.heard("t/2", b"two")
    return heard.messages


async def retained(a, b, said, heard):
    a.publish("late/1", b"kept", retain=True)
    a.publish("t/1", b"mark")
    await heard.heard("t/1", b"mark")
    b.subscribe(("late/1", "late/2"))
    await heard.heard("late/1", b"kept")
    a.publish("late/1", b"", retain=True)
    a.publish("t/1", b"end")
    await heard.heard("t/1", b"end")
    return [event for event in heard.messages if event[1]]


async def retained_by_filter(a, b, said, heard):
    a.publish("deep/x/1", b"kept", retain=True)
    a.publish("t/1", b"mark")
    await heard.heard("t/1", b"mark")
    b.subscribe(("deep/#",))
    await heard.heard("deep/x/1", b"kept")
    return heard.messages


async def subscribed_again(a, b, said, heard):
    a.publish("chunk", b"kept", retain=True)
    a.publish("t/1", b"mark")
    await heard.heard("t/1", b"mark")
    for times in (1, 2, 3):
        b.unsubscribe(("chunk",))
        b.subscribe(("chunk",))
        await heard.heard("chunk", b"kept", times=times)
    return heard.messages


async def unsubscribed(a, b, said, heard):
    b.subscribe(("u/1", "u/2"))
    b.unsubscribe(("u/1",))
    b.publish("t/1", b"ready")
    await heard.heard("t/1", b"ready")
    a.publish("u/1", b"no")
    a.publish("u/2", b"yes")
    await heard.heard("u/2", b"yes")
    return heard.messages


async def dropped(a, b, said, heard):
    a.drop()
    await heard.heard("will/a", b"gone")
    await said.until(lambda events: [event[0] for event in events] == ["connected", "disconnected", "connected"])
    a.publish("t/1", b"back")
    await heard.heard("t/1", b"back")
    return heard.messages


async def unconnected(a, b, said, heard):
    a.drop()
    await said.until(lambda events: events[-1][0] == "disconnected" or len(events) == 3)
    while said.events[-1][0] != "connected":
        a.publish("t/1", b"lost")
        a.subscribe(("t/2",))
        await asyncio.sleep(0)
    a.publish("t/2", b"found")
    await heard.heard("t/2", b"found")
    return [event for event in heard.messages if event != ("will/a", b"gone")]


async def large(a, b, said, heard):
    a.publish("t/1", bytes(2**20))
    await heard.heard("t/1", bytes(2**20))
    return [(topic, len(payload)) for topic, payload in heard.messages]


SCENARIOS = {
    plain: [("t/1", b"one"), ("t/2", b"two")],
    retained: [("t/1", b"mark"), ("late/1", b"kept"), ("t/1", b"end")],
    retained_by_filter: [("t/1", b"mark"), ("deep/x/1", b"kept")],
    subscribed_again: [("t/1", b"mark"), *[("chunk", b"kept")] * 3],
    unsubscribed: [("t/1", b"ready"), ("u/2", b"yes")],
    dropped: [("will/a", b"gone"), ("t/1", b"back")],
    unconnected: [("t/2", b"found")],
    large: [("t/1", 2**20)],
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_link_gives_the_same_sequence(network, scenario):
    async def play():
        a, b = network("a", ("will/a", b"gone")), network("b")
        said, heard = Recorder(a), Recorder(b, ("t/1", "t/2", "will/a"))
        async with running(a, said), running(b, heard):
            b.publish("t/1", b"subscribed")
            await heard.heard("t/1", b"subscribed")
            heard.events.clear()
            assert await scenario(a, b, said, heard) == SCENARIOS[scenario]

    asyncio.run(play())


def test_a_link_is_settled_once_the_broker_has_acknowledged_and_only_while_it_is_connected(network):
    async def play():
        link = network("a")
        assert not link.settled
        async with running(link, Recorder()):
            for _ in range(50):
                link.publish("t/1", bytes(1000))
            if isinstance(link, MqttLink):
                assert not link.settled
            async with asyncio.timeout(10):
                while not link.settled:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert not link.settled

    asyncio.run(play())


def test_closing_sends_what_is_queued_and_no_will(network):
    async def play():
        a, b = network("a", ("will/a", b"gone")), network("b")
        heard = Recorder(b, ("t/1", "will/a"))
        async with running(b, heard):
            b.publish("t/1", b"subscribed")
            await heard.heard("t/1", b"subscribed")
            async with running(a, Recorder()):
                a.publish("t/1", b"goodbye")
            await heard.heard("t/1", b"goodbye")
            b.publish("t/1", b"end")
            await heard.heard("t/1", b"end")
            assert ("will/a", b"gone") not in heard.events
        a.publish("t/1", b"nobody there")
        a.drop()

    asyncio.run(play())


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_that_is_killed_and_started_again_is_found_again(tmp_path, kind):
    async def play():
        first = EmbeddedBroker.start(tmp_path, kind=kind)
        address = Address.parse(first.url)
        link = MqttLink(address, "a", slowest=0.1)
        recorder = Recorder(link, ("t",))
        async with running(link, recorder):
            await asyncio.to_thread(first.stop)
            await recorder.until(lambda events: len(events) >= 3)
            kinds = [event[0] for event in recorder.events]
            assert kinds[:3] == ["connected", "disconnected", "disconnected"]
            second = await asyncio.to_thread(EmbeddedBroker.start, tmp_path, kind=kind, port=address.port)
            try:
                await recorder.heard("connected", times=2)
                link.publish("t", b"back")
                await recorder.heard("t", b"back")
                assert link.traffic.sent > 0
            finally:
                await link.close()
                await asyncio.to_thread(second.stop)

    asyncio.run(play())


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_without_a_broker_is_named_after_the_attempts():
    async def play():
        port = closed_port()
        recorder = Recorder()
        link = MqttLink(Address("127.0.0.1", port), "a", attempts=3, slowest=0.01)
        with pytest.raises(TransportError, match=rf"mqtt://127\.0\.0\.1:{port} after 3 attempts: .*refused"):
            await asyncio.wait_for(link.run(recorder), 20)
        assert [event[0] for event in recorder.events] == ["disconnected"] * 3

    asyncio.run(play())


def test_a_name_that_does_not_resolve_is_named():
    async def play():
        link = MqttLink(Address("no-such-host.invalid", 1883), "a", attempts=1)
        with pytest.raises(TransportError, match=r"no-such-host\.invalid:1883 after 1 attempts"):
            await asyncio.wait_for(link.run(Recorder()), 20)

    asyncio.run(play())


async def serve_once(reply):
    """A listener that answers any bytes with ``reply`` and closes."""

    async def serve(reader, writer):
        await reader.read(1000)
        writer.write(reply)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"\x20\x02\x00\x05", "refuses: Not authorized"),
        (b"", "closed"),
        (b"HTTP/1.1 400 Bad\r\n\r\n", "closed|refuses"),
    ],
)
def test_a_refused_connection_says_so(reply, reason):
    async def play():
        server = await serve_once(reply)
        port = server.sockets[0].getsockname()[1]
        link = MqttLink(Address("127.0.0.1", port), "a", attempts=2, slowest=0.01)
        recorder = Recorder()
        with pytest.raises(TransportError, match=rf":{port} after 2 attempts: .*({reason})"):
            await asyncio.wait_for(link.run(recorder), 20)
        assert ("connected",) not in recorder.events
        server.close()

    asyncio.run(play())


def test_closing_while_nothing_answers_ends_run():
    async def play():
        link = MqttLink(Address("127.0.0.1", closed_port()), "a")
        recorder = Recorder()
        life = asyncio.ensure_future(link.run(recorder))
        await recorder.until(lambda events: len(events) >= 1)
        await link.close()
        await asyncio.wait_for(life, 5)

    asyncio.run(play())


class Proxy:
    """Forwards TCP on loopback and counts the bytes of each direction."""

    def __init__(self, address):
        self.address, self.up, self.down = address, 0, 0

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return Address("127.0.0.1", self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader, writer):
        far_reader, far_writer = await asyncio.open_connection(self.address.host, self.address.port)
        await asyncio.gather(self._pump(reader, far_writer, "up"), self._pump(far_reader, writer, "down"))

    async def _pump(self, reader, writer, way):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


def test_traffic_is_what_crosses_the_socket_over_reconnections(broker):
    async def play():
        proxy = Proxy(Address.parse(broker.url))
        link = MqttLink(await proxy.start(), "counted", slowest=0.1)
        recorder = Recorder(link, ("counted",))
        async with running(link, recorder):
            for number in (1, 2):
                link.publish("counted", bytes(100_000))
                await recorder.heard("counted", bytes(100_000), times=number)
                link.drop()
                await recorder.heard("connected", times=number + 1)
        traffic = link.traffic
        assert traffic.sent == proxy.up
        assert 200_000 < traffic.received <= proxy.down
        assert proxy.down - traffic.received < 100  # acknowledgements under way when the connection fell
        proxy.server.close()

    asyncio.run(play())


def without_delay(client):
    return client.socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_small_messages_do_not_wait_for_each_other_on_any_connection(broker):
    address = Address.parse(broker.url)
    settings = msgspec.convert({"federation": {"name": "f", "bundle": "b"}}, Federation)

    async def play():
        for link in (MqttLink(address, "client"), server_link(settings, address)):
            async with running(link, Recorder()):
                assert without_delay(link._client)
                link.drop()
                await asyncio.wait_for(reconnected(link), 10)
                assert without_delay(link._client)

    async def reconnected(link):
        first = link._client
        while link._client is first or link._client is None or not link._client.is_connected():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    asyncio.run(play())
    with Peer(address, "doctor") as peer:
        assert without_delay(peer._client)


def test_tls_hands_over_every_message_of_a_record(tmp_path, monkeypatch):
    """Two packets in one TLS record: the second must not wait until the socket is readable again."""
    authority = Certificates(tmp_path / "authority").folder
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.crt"))
    messages = b"".join(b"\x30\x04\x00\x01t" + str(number).encode() for number in range(10))

    async def play():
        async def serve(reader, writer):
            await reader.read(1000)
            writer.write(b"\x20\x02\x00\x00" + messages)
            await reader.read(1000)
            writer.close()

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority / "broker.crt", authority / "broker.key")
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        link = MqttLink(Address("localhost", server.sockets[0].getsockname()[1], tls=True), "a", attempts=1)
        recorder = Recorder()
        async with running(link, recorder):
            await recorder.until(lambda events: len(events) >= 11, 3.0)
            assert recorder.messages == [("t", str(number).encode()) for number in range(10)]
        server.close()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("refusals", "lost"), [(1, 0), (3, 0), (4, 1), (9, 2)], ids=["once", "for a while", "too often", "long"]
)
def test_a_refused_subscription_is_asked_for_again_and_costs_the_connection_at_last(refusals, lost):
    """A cluster that has just lost a node refuses for a while; a client that stays deaf would hear nothing for ever."""

    async def play():
        packets = []

        async def serve(reader, writer):
            await reader.readuntil(b"picky")
            writer.write(b"\x20\x02\x00\x00")
            first = True
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while len(packets) <= refusals:
                    packet = await reader.readuntil(b"two\x01")
                    packets.append(packet)
                    # Only what was refused is asked for again.
                    assert (b"one" in packet) is first
                    granted = b"\x01" if len(packets) > refusals else b"\x80"
                    at = packet.rindex(b"\x82") + 2
                    writer.write(b"\x90" + (b"\x04" if first else b"\x03") + packet[at : at + 2])
                    writer.write((b"\x01" if first else b"") + granted)
                    first = False
                writer.write(b"\x30\x06\x00\x03onex")
                await reader.read()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        link = MqttLink(Address("127.0.0.1", server.sockets[0].getsockname()[1]), "picky", slowest=0.01)
        recorder = Recorder(link, ("one", "two"))
        async with running(link, recorder):
            await recorder.heard("one", b"x")
        kinds = [event[0] for event in recorder.events]
        assert kinds == ["connected", "disconnected"] * lost + ["connected", "one"]
        assert all("refuses a subscription" in event[1] for event in recorder.events if event[0] == "disconnected")
        assert len(packets) == refusals + 1
        server.close()

    asyncio.run(play())


def test_connections_that_end_at_once_name_the_broker_and_the_doubt():
    """A broker ends the older of two connections of one name without saying why."""
    reasons, enough = [], asyncio.Event()

    class Handler:
        def connected(self):
            pass

        def disconnected(self, reason):
            reasons.append(reason)
            if len(reasons) == 5:
                enough.set()

        def message(self, topic, payload):
            raise AssertionError(topic)

    async def greet(reader, writer):
        await reader.read(1024)
        writer.write(b"\x20\x02\x00\x00")
        await writer.drain()
        writer.close()

    async def play():
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
        link = MqttLink(address, "fedge-demo-pi", slowest=0.01)
        life = asyncio.ensure_future(link.run(Handler()))
        await asyncio.wait_for(enough.wait(), 20)
        await link.close()
        await life
        server.close()
        return address

    address = asyncio.run(play())
    assert [reason for reason in reasons if not reason.startswith(f"broker {address}: ")] == []
    assert [("another client named 'fedge-demo-pi'" in reason) for reason in reasons[:5]] == [False] * 3 + [True] * 2


def test_what_is_retained_while_the_server_listens_is_cleared_too(broker):
    """It comes as any message does, with nothing that says it was retained."""

    async def play():
        address, topic = Address.parse(broker.url), "fedge/demo/up/y/junk"
        server = MqttLink(address, "server", clears="fedge/demo/up/", sweep=0.05)
        liar, again = MqttLink(address, "liar"), MqttLink(address, "again")
        heard, first, late = (
            Recorder(server, ("fedge/demo/up/#",)),
            Recorder(liar),
            Recorder(again, ("fedge/demo/up/#",)),
        )
        async with running(server, heard), running(liar, first):
            liar.publish(topic, b"for ever", retain=True)
            await heard.heard(topic, b"for ever")
            await heard.until(lambda events: (topic, b"") in events)
            async with running(again, late):
                server.publish("fedge/demo/up/mark", b"mark")
                await late.heard("fedge/demo/up/mark", b"mark")
                assert not [event for event in late.messages if event[0] == topic]

    asyncio.run(play())


def test_what_is_retained_where_nobody_has_to_is_cleared_and_not_handed_on(broker):
    async def play():
        address = Address.parse(broker.url)
        server = MqttLink(address, "server", clears="fedge/demo/up/")
        liar, again = MqttLink(address, "liar"), MqttLink(address, "again")
        first = Recorder(liar)
        async with running(liar, first):
            liar.publish("fedge/demo/up/x/msg", b"for ever", retain=True)
            liar.publish("fedge/demo/pub/offer", b"offer", retain=True)
            while not liar.settled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        heard = Recorder(server, ("fedge/demo/up/#", "fedge/demo/pub/offer"))
        async with running(server, heard):
            await heard.heard("fedge/demo/pub/offer", b"offer")
            await heard.until(lambda events: ("fedge/demo/up/x/msg", b"") in events)
            assert ("fedge/demo/up/x/msg", b"for ever") not in heard.events
            server.publish("fedge/demo/pub/offer", b"", retain=True)
            late = Recorder(again, ("fedge/demo/up/#",))
            async with running(again, late):
                server.publish("fedge/demo/up/mark", b"mark")
                await late.heard("fedge/demo/up/mark", b"mark")
                assert not [event for event in late.messages if event[0] == "fedge/demo/up/x/msg"]

    asyncio.run(play())
