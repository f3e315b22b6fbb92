"""MQTT through paho on an asyncio loop, and a twin in memory.

A link promises nothing but to try: brokers drop messages that they have acknowledged, so every guarantee is the
protocol's. Each connection is a new MQTT session, and what was queued for the old one is gone with it.
"""

import asyncio
import contextlib
import random
import re
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_client.errors import TransportError
from edge_client.wire.messages import Traffic

QOS = 1


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


@dataclass(frozen=True)
class Address:
    """Where a broker listens: ``mqtt://[user:password@]host[:port][/federation]``, ``mqtts://`` for TLS."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = None
    federation: str | None = None

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Read a URL.

        Raises:
            TransportError: it is not one that fedge can use.
        """
        shown = re.sub(r"//[^@/]*@", "//...@", url)  # a log is no place for a password
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise TransportError(f"broker URL {shown!r}: {error}; expected mqtt://host:port") from error
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise TransportError(f"broker URL {shown!r} is not of the form mqtt://host:port or mqtts://host:port")
        tls = parts.scheme == "mqtts"
        name = parts.path.strip("/") or None
        user = None if parts.username is None else unquote(parts.username)
        password = None if parts.password is None else unquote(parts.password)
        return cls(parts.hostname, port or (8883 if tls else 1883), tls, user, password, name)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


class _Client(mqtt.Client):
    """paho's client, counting the bytes that cross its socket (inside TLS, where there is TLS)."""

    sent = 0
    received = 0

    def _sock_recv(self, bufsize: int) -> bytes:
        data = super()._sock_recv(bufsize)
        self.received += len(data)
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        count = super()._sock_send(buf)
        self.sent += count
        return count


@dataclass
class MqttLink:
    """A link over TCP or TLS, with reconnection.

    ``attempts`` bounds how often in a row a connection is tried before `run` raises TransportError; 0 tries for ever,
    with a back-off of 1 to ``slowest`` seconds, jittered.
    """

    address: Address
    client_id: str
    will: tuple[str, bytes] | None = None
    attempts: int = 0
    keepalive: int = 30
    slowest: float = 60.0
    _client: _Client | None = field(init=False, default=None)
    _counted: Traffic = field(init=False, default_factory=Traffic)
    _closing: bool = field(init=False, default=False)
    _over: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _lost: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _reason: str = field(init=False, default="")

    @property
    def traffic(self) -> Traffic:
        """Bytes counted since the link was made, MQTT framing included."""
        client = self._client
        if client is None:
            return self._counted
        return Traffic(self._counted.sent + client.sent, self._counted.received + client.received)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message; without a connection it is dropped."""
        client = self._up()
        if client is not None:
            client.publish(topic, payload, QOS, retain)

    def subscribe(self, topics: tuple[str, ...]) -> None:
        """Subscribe to topics, all in one packet."""
        client = self._up()
        if client is not None and topics:
            client.subscribe([(topic, QOS) for topic in topics])

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        """Unsubscribe from topics, all in one packet."""
        client = self._up()
        if client is not None and topics:
            client.unsubscribe(list(topics))

    async def run(self, handler: Handler) -> None:
        """Connect, and connect again whenever the connection is lost, until closed.

        Raises:
            TransportError: ``attempts`` connections in a row failed.
        """
        failures = 0
        while not self._closing:
            self._lost.clear()
            accepted = await self._connect(handler)
            if accepted:
                failures = 0
                while not self._lost.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._lost.wait(), 1.0)
                    if self._client is not None:
                        self._client.loop_misc()
            self._retire()
            if self._closing:
                return
            handler.disconnected(self._reason)
            failures += not accepted
            if self.attempts and failures >= self.attempts:
                raise TransportError(
                    f"broker {self.address} after {failures} attempts: {self._reason}; is it running and reachable?"
                )
            with contextlib.suppress(TimeoutError):
                pause = min(self.slowest, 2.0 ** min(max(failures - 1, 0), 10)) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.wait_for(self._over.wait(), pause)

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
            if not client.want_write() and not client._out_messages:
                break
            await asyncio.sleep(0.01)
        accepted = client.is_connected()
        client.disconnect()
        if accepted:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), 2.0)
        self._lost.set()

    def _up(self) -> _Client | None:
        """The client while the broker takes messages; paho would queue them before that, and send them later."""
        return self._client if self._client is not None and self._client.is_connected() else None

    async def _connect(self, handler: Handler) -> bool:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        client = self._make(loop, handler, answer)
        self._client = client
        try:
            await loop.run_in_executor(None, client.connect, self.address.host, self.address.port, self.keepalive)
            self._reason = await asyncio.wait_for(answer, 20.0)
        except TimeoutError:
            self._reason = "no answer within 20 s"
        except (OSError, ValueError) as error:
            self._reason = str(error) or type(error).__name__
        return not self._reason

    def _make(self, loop: asyncio.AbstractEventLoop, handler: Handler, answer: "asyncio.Future[str]") -> _Client:
        client = _Client(CallbackAPIVersion.VERSION2, self.client_id, protocol=mqtt.MQTTv311)
        if self.address.username is not None:
            client.username_pw_set(self.address.username, self.address.password)
        if self.address.tls:
            client.tls_set_context(ssl.create_default_context())
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
            if not answer.done():
                answer.set_result(f"connection closed: {code}")
            self._reason = f"connection lost: {code}"
            on_loop(self._lost.set)

        def arrived(_c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
            handler.message(message.topic, bytes(message.payload))

        client.on_socket_open = opened
        client.on_socket_close = closed
        client.on_socket_register_write = lambda _c, _u, sock: on_loop(write, sock)
        client.on_socket_unregister_write = lambda _c, _u, sock: on_loop(loop.remove_writer, sock)
        client.on_connect = accepted
        client.on_disconnect = lost
        client.on_message = arrived
        return client

    def _retire(self) -> None:
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


class MemoryBroker:
    """A broker without sockets: exact topics, ``#`` filters, retained messages, last wills."""

    def __init__(self) -> None:
        self._retained: dict[str, bytes] = {}
        self._links: list[MemoryLink] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver to whoever has subscribed; keep a retained message, or clear it when it is empty."""
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for link in list(self._links):
            if payload and link.wants(topic):
                link.deliver(topic, payload)

    def attach(self, link: "MemoryLink") -> None:
        """A link has connected."""
        self._links.append(link)

    def detach(self, link: "MemoryLink") -> None:
        """A link is gone."""
        if link in self._links:
            self._links.remove(link)

    def retained(self, topic: str) -> bytes | None:
        """The retained message of a topic."""
        return self._retained.get(topic)

    def matching(self, wanted: str) -> list[tuple[str, bytes]]:
        """The retained messages that a filter matches."""
        if not wanted.endswith("#"):
            return [(wanted, self._retained[wanted])] if wanted in self._retained else []
        return [(topic, payload) for topic, payload in self._retained.items() if _matches(wanted, topic)]


class MemoryLink:
    """A link to a `MemoryBroker` in the same process; messages arrive on a later turn of the event loop."""

    def __init__(self, broker: MemoryBroker, *, will: tuple[str, bytes] | None = None) -> None:
        self._broker = broker
        self._will = will
        self._filters: set[str] = set()
        self._handler: Handler | None = None
        self._sent = 0
        self._received = 0
        self._over = asyncio.Event()
        self._lost = asyncio.Event()

    @property
    def traffic(self) -> Traffic:
        """Payload bytes counted since the link was made."""
        return Traffic(self._sent, self._received)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message; without a connection it is dropped."""
        if self._handler is not None:
            self._sent += len(payload)
            self._broker.publish(topic, payload, retain=retain)

    def subscribe(self, topics: tuple[str, ...]) -> None:
        """Subscribe to topics; their retained messages follow."""
        if self._handler is None:
            return
        for wanted in topics:
            self._filters.add(wanted)
            for topic, payload in self._broker.matching(wanted):
                self.deliver(topic, payload)

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        """Unsubscribe from topics."""
        self._filters.difference_update(topics)

    def wants(self, topic: str) -> bool:
        """Whether a subscription matches ``topic``."""
        return any(_matches(wanted, topic) for wanted in self._filters)

    def deliver(self, topic: str, payload: bytes) -> None:
        """Hand a message to the handler on a later turn."""
        asyncio.get_running_loop().call_soon(self._arrived, topic, payload)

    async def run(self, handler: Handler) -> None:
        """Connect, and connect again whenever the connection was dropped, until closed."""
        while not self._over.is_set():
            self._lost.clear()
            self._handler = handler
            self._broker.attach(self)
            handler.connected()
            await self._lost.wait()
            if not self._over.is_set():
                handler.disconnected("dropped")

    def drop(self) -> None:
        """Let the connection fall: the broker sends the last will."""
        if self._handler is None:
            return
        self._leave()
        if self._will is not None:
            self._broker.publish(self._will[0], self._will[1], retain=False)

    async def close(self) -> None:
        """Disconnect and end `run`."""
        self._over.set()
        self._leave()

    def _leave(self) -> None:
        self._broker.detach(self)
        self._handler = None
        self._filters.clear()
        self._lost.set()

    def _arrived(self, topic: str, payload: bytes) -> None:
        if self._handler is not None and self.wants(topic):
            self._received += len(payload)
            self._handler.message(topic, payload)


def _matches(wanted: str, topic: str) -> bool:
    return topic == wanted or (wanted.endswith("#") and topic.startswith(wanted[:-1]))
