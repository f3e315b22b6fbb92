"""MQTT through paho on an asyncio loop; `edge_client.memory` is its twin without sockets.

A link promises nothing but to try: brokers drop messages that they have acknowledged, so every guarantee is the
protocol's. Each connection is a new MQTT session, and what was queued for the old one is gone with it.
"""

import asyncio
import contextlib
import math
import random
import secrets
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_client.address import Address
from edge_client.client import Client
from edge_client.errors import TransportError
from edge_client.tls import Tls, explain
from edge_client.wire.messages import Traffic

QOS = 1
_SETTLED = 10.0
"""Seconds after which a connection counts as one that lasts: the pauses between attempts start anew."""
_FLEET = 3.0
"""Seconds over which a fleet comes back."""
_LOST = "connection lost"
_REFUSALS = 3
"""How often a subscription is asked for once more before the connection is given up."""
_DOUBTFUL = 4
"""Short connections in a row after which another client of the same name is suspected."""


def back_off(short: int, slowest: float, rng: random.Random) -> float:
    """Seconds before the next connection, after ``short`` ones in a row that failed or did not last.

    After one that lasted, anywhere in the first few: a broker that is started anew loses its whole fleet at once. Then
    one second, doubled each time up to ``slowest``, of which half is at random.
    """
    if not short:
        return rng.uniform(0.0, min(slowest, _FLEET))
    return min(slowest, 2.0 ** min(short - 1, 10)) * rng.uniform(0.5, 1.0)


class Handler(Protocol):
    """Who is told what happens on a link; called on the event loop."""

    def connected(self) -> None:
        """The broker has accepted the connection."""

    def disconnected(self, reason: str) -> None:
        """The connection is gone, or could not be made."""

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""


class Link(Protocol):
    """One client's connection to a broker."""

    @property
    def traffic(self) -> Traffic:
        """Bytes counted since the link was made, MQTT framing included."""

    @property
    def settled(self) -> bool:
        """Whether the broker has acknowledged everything that was published on this connection."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message; without a connection it is dropped."""

    def subscribe(self, topics: tuple[str, ...]) -> None:
        """Subscribe to topics, all in one packet."""

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        """Unsubscribe from topics, all in one packet."""

    async def run(self, handler: Handler) -> None:
        """Connect, and connect again whenever the connection is lost, until closed."""

    def drop(self) -> None:
        """Let the connection fall without a word, as a power cut would: the broker sends the last will."""

    async def close(self) -> None:
        """Send what is queued, disconnect and end `run`."""


@dataclass
class MqttLink:
    """A link over TCP or TLS, with reconnection.

    ``attempts`` bounds how often in a row a connection is tried before `run` raises TransportError; 0 tries for ever,
    with a back-off of up to ``slowest`` seconds (`back_off`), that only a connection which lasts resets. What others
    have retained on topics that begin with ``clears`` is cleared, not handed on, and looked for each ``sweep`` seconds.
    ``tls`` is read anew for each connection, so that a renewed certificate is used from the next one on.
    """

    address: Address
    client_id: str
    will: tuple[str, bytes] | None = None
    attempts: int = 0
    keepalive: int = 30
    slowest: float = 60.0
    clears: str = ""
    sweep: float = math.inf
    tls: Tls | None = None
    """Who is trusted and who one is; without it, and with ``mqtts://``, the system's authorities and nobody."""
    _client: Client | None = field(init=False, default=None)
    _counted: Traffic = field(init=False, default_factory=Traffic)
    _closing: bool = field(init=False, default=False)
    _over: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _lost: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _reason: str = field(init=False, default="")
    _asked: dict[int, tuple[str, ...]] = field(init=False, default_factory=dict)
    """By packet, the topics that were subscribed to and not answered yet."""
    _refused: dict[str, int] = field(init=False, default_factory=dict)
    """By topic, how often in a row the broker has refused a subscription to it on this connection."""
    _rng: random.Random = field(init=False, default_factory=random.Random)
    _name: str = field(init=False)

    def __post_init__(self) -> None:
        # A broker ends a connection when another one of its name comes, whoever made that: with a certificate of its
        # own, any device could end the server's. Nobody guesses this one.
        certified = self.address.tls and self.tls is not None and self.tls.certificate is not None
        self._name = f"{self.client_id}-{secrets.token_hex(8)}" if certified else self.client_id

    @property
    def traffic(self) -> Traffic:
        """Bytes counted since the link was made, MQTT framing included."""
        client = self._client
        if client is None:
            return self._counted
        return Traffic(self._counted.sent + client.sent, self._counted.received + client.received)

    @property
    def settled(self) -> bool:
        """Whether the broker has acknowledged everything that was published on this connection."""
        client = self._up()
        return client is not None and _acknowledged(client)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message; without a connection it is dropped."""
        client = self._up()
        if client is not None:
            client.publish(topic, payload, QOS, retain)

    def subscribe(self, topics: tuple[str, ...]) -> None:
        """Subscribe to topics, all in one packet."""
        client = self._up()
        if client is not None and topics:
            _, packet = client.subscribe([(topic, QOS) for topic in topics])
            if packet is not None:
                self._asked[packet] = topics

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        """Unsubscribe from topics, all in one packet."""
        client = self._up()
        if client is not None and topics:
            client.unsubscribe(list(topics))
            for topic in topics:
                self._refused.pop(topic, None)

    async def run(self, handler: Handler) -> None:
        """Connect, and connect again whenever the connection is lost, until closed.

        Raises:
            TransportError: ``attempts`` connections in a row failed.
        """
        loop = asyncio.get_running_loop()
        failures, short = 0, 0
        while not self._closing:
            self._lost.clear()
            accepted, began = await self._connect(handler), loop.time()
            if accepted:
                failures, swept = 0, began
                while not self._lost.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._lost.wait(), min(1.0, self.sweep))
                    if self.clears and loop.time() - swept >= self.sweep:
                        swept = loop.time()
                        self.subscribe((self.clears + "#",))  # MQTT 3.1.1 tells a subscriber only so
                    if self._client is not None:
                        self._client.loop_misc()
            self._retire()
            if self._closing:
                return
            failures += not accepted
            short = 0 if loop.time() - began >= _SETTLED else short + 1
            # Brokers end a connection without a word when another one of the same name comes.
            doubtful = short >= _DOUBTFUL and self._reason.startswith(_LOST) and self._name == self.client_id
            doubt = f"; is there another client named {self.client_id!r}?" if doubtful else ""
            handler.disconnected(f"broker {self.address}: {self._reason}{doubt}")
            if self.attempts and failures >= self.attempts:
                raise TransportError(
                    f"broker {self.address} after {failures} attempts: {self._reason}; is it running and reachable?"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), back_off(short, self.slowest, self._rng))

    def drop(self) -> None:
        """Let the connection fall without a word, as a power cut would: the broker sends the last will."""
        client = self._client
        sock = client.socket() if client is not None else None
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Send what is queued, disconnect and end `run`."""
        self._closing = True
        self._over.set()
        client = self._client
        if client is None:
            self._lost.set()
            return
        for _ in range(200):
            if _acknowledged(client):
                break
            await asyncio.sleep(0.01)
        accepted = client.is_connected()
        client.disconnect()
        if accepted:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), 2.0)
        self._lost.set()

    def _up(self) -> Client | None:
        """The client while the broker takes messages; paho would queue them before that, and send them later."""
        return self._client if self._client is not None and self._client.is_connected() else None

    async def _connect(self, handler: Handler) -> bool:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        self._reason = ""
        try:
            self._client = client = self._make(loop, handler, answer)
            await loop.run_in_executor(None, client.connect, self.address.host, self.address.port, self.keepalive)
            refusal = await asyncio.wait_for(answer, 20.0)
        except TimeoutError:
            refusal = "no answer within 20 s"
        except TransportError as error:
            refusal = str(error)
        except (OSError, ValueError) as error:
            refusal = explain(error) if isinstance(error, ssl.SSLError) else str(error) or type(error).__name__
        # An accepted connection may be lost already, and why it was is known then.
        self._reason = refusal or self._reason
        return not refusal

    def _make(self, loop: asyncio.AbstractEventLoop, handler: Handler, answer: "asyncio.Future[str]") -> Client:
        client = Client(CallbackAPIVersion.VERSION2, self._name, protocol=mqtt.MQTTv311)
        if self.address.username is not None:
            client.username_pw_set(self.address.username, self.address.password)
        if self.address.tls:
            client.tls_set_context((self.tls or Tls()).context())
        if self.will is not None:
            client.will_set(self.will[0], self.will[1], QOS)
        home = threading.get_ident()

        def on_loop(call: Callable[..., object], *arguments: object) -> None:
            if threading.get_ident() == home:
                call(*arguments)
            else:
                loop.call_soon_threadsafe(call, *arguments)

        def read() -> None:
            client.loop_read()
            # TLS hands over whole records: what is left of one does not make the socket readable again.
            while isinstance(sock := client.socket(), ssl.SSLSocket) and sock.pending():
                client.loop_read()

        def watch(sock: socket.socket) -> None:
            if client.socket() is sock:
                loop.add_reader(sock, read)

        def opened(_c: mqtt.Client, _u: Any, sock: Any) -> None:
            # paho leaves Nagle's algorithm on: each small exchange would wait 40 ms for a delayed acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            on_loop(watch, sock)

        def closed(_c: mqtt.Client, _u: Any, sock: Any) -> None:
            on_loop(loop.remove_reader, sock.fileno())
            on_loop(loop.remove_writer, sock.fileno())

        def write(sock: socket.socket) -> None:
            if client.socket() is sock:
                loop.add_writer(sock, client.loop_write)

        def accepted(_c: mqtt.Client, _u: Any, _f: mqtt.ConnectFlags, code: ReasonCode, _p: Any) -> None:
            if not answer.done():
                answer.set_result(f"the broker refuses: {code}" if code.is_failure else "")
            if not code.is_failure:
                handler.connected()

        def lost(_c: mqtt.Client, _u: Any, _f: mqtt.DisconnectFlags, code: ReasonCode, _p: Any) -> None:
            said = str(code) if client.alert is None else explain(client.alert)
            if not answer.done():
                answer.set_result(f"connection closed: {said}")
            self._reason = f"{_LOST}: {said}"
            on_loop(self._lost.set)

        def granted(_c: mqtt.Client, _u: Any, packet: int, codes: list[ReasonCode], _p: Any) -> None:
            on_loop(self._granted, client, packet, [not code.is_failure for code in codes])

        def arrived(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
            if message.retain and self.clears and message.topic.startswith(self.clears):
                client.publish(message.topic, b"", QOS, retain=True)
                return
            handler.message(message.topic, bytes(message.payload))

        client.on_socket_open = opened
        client.on_socket_close = closed
        client.on_socket_register_write = lambda _c, _u, sock: on_loop(write, sock)
        client.on_socket_unregister_write = lambda _c, _u, sock: on_loop(loop.remove_writer, sock)
        client.on_connect = accepted
        client.on_disconnect = lost
        client.on_message = arrived
        client.on_subscribe = granted
        return client

    def _granted(self, client: Client, packet: int, granted: list[bool]) -> None:
        """A subscription is answered. A cluster that has just lost a member refuses for a while; rules, for ever."""
        if client is not self._client:
            return
        again = []
        for topic, there in zip(self._asked.pop(packet, ()), granted, strict=False):
            if there:
                self._refused.pop(topic, None)
            else:
                self._refused[topic] = self._refused.get(topic, 0) + 1
                again.append(topic)
        if not again:
            return
        often = max(self._refused[topic] for topic in again)
        if often > _REFUSALS:
            # Deaf on one topic is deaf for ever.
            self._reason = "the broker refuses a subscription; do its access rules allow it?"
            self._lost.set()
            return
        pause = back_off(often, self.slowest, self._rng)
        asyncio.get_running_loop().call_later(pause, self._ask_again, client, tuple(again))

    def _ask_again(self, client: Client, topics: tuple[str, ...]) -> None:
        if client is self._client:
            self.subscribe(tuple(topic for topic in topics if topic in self._refused))

    def _retire(self) -> None:
        self._asked.clear()
        self._refused.clear()
        client, self._client = self._client, None
        if client is None:
            return
        self._counted = Traffic(self._counted.sent + client.sent, self._counted.received + client.received)
        client.on_message = client.on_connect = client.on_disconnect = None
        sock = client.socket()
        if sock is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(sock)
            loop.remove_writer(sock)
            client._sock_close()


def _acknowledged(client: mqtt.Client) -> bool:
    return not client.want_write() and not client._out_messages
