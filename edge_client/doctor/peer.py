"""An MQTT connection to experiment with: it does one thing at a time, and tells all that a broker answers.

`edge_client.transport` hides what a broker does; this shows it: acknowledgements, refusals, lost connections, messages
that are not acknowledged. It never connects again by itself.
"""

import contextlib
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_client.address import Address
from edge_client.client import Client
from edge_client.errors import TransportError
from edge_client.tls import Tls, explain

_QOS = 1
_ANSWER = 10.0
"""Seconds to wait for an answer that every broker gives. NATS takes two for the first connection of its life."""


class Heard(NamedTuple):
    """A message as it came."""

    topic: str
    payload: bytes
    number: int
    """What to acknowledge it by."""


class Peer:
    """One connection.

    Args:
        address: the broker's.
        name: the client's; at most 23 characters, which every broker takes.
        version: 4 for MQTT 3.1.1, 5 for MQTT 5.
        clean: whether what the broker keeps for this name is thrown away, before and after.
        manual: whether messages are acknowledged by `acknowledge` alone.
        tls: who is trusted and who one is; without it, and with ``mqtts://``, the system's authorities and nobody.

    Raises (from ``with``):
        TransportError: the broker cannot be reached or refuses.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        *,
        version: int = 4,
        clean: bool = True,
        manual: bool = False,
        tls: Tls | None = None,
    ) -> None:
        self.heard: deque[Heard] = deque()
        self.lost = ""
        """Why the connection ended; empty while it stands."""
        self.largest_packet: int | None = None
        """What an MQTT 5 broker says it takes, in bytes of a whole packet; None where it says nothing."""
        self._address, self._clean, self._five = address, clean, version == 5
        self._answers: dict[tuple[str, int], list[ReasonCode]] = {}
        protocol = mqtt.MQTTv5 if self._five else mqtt.MQTTv311
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            name,
            clean_session=None if self._five else clean,
            protocol=protocol,
            manual_ack=manual,
        )
        self._client.max_inflight_messages_set(1000)
        if address.username is not None:
            self._client.username_pw_set(address.username, address.password)
        if address.tls:
            self._client.tls_set_context((tls or Tls()).context())
        self._client.on_socket_open = _without_delay
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message
        self._client.on_publish = lambda _c, _u, mid, code, _p: self._answer("publish", mid, [code])
        self._client.on_subscribe = lambda _c, _u, mid, codes, _p: self._answer("subscribe", mid, codes)

    def __enter__(self) -> Self:
        properties = None
        if self._five and not self._clean:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 60
        try:
            if self._five:
                self._client.connect(
                    self._address.host, self._address.port, clean_start=self._clean, properties=properties
                )
            else:
                self._client.connect(self._address.host, self._address.port)
        except (OSError, ValueError) as error:
            why = explain(error) if isinstance(error, ssl.SSLError) else str(error) or type(error).__name__
            raise TransportError(f"broker {self._address}: {why}") from error
        answered = self.wait(lambda: ("connect", 0) in self._answers, _ANSWER)
        code = self._answers.get(("connect", 0), [None])[0]
        if code is None or code.is_failure:
            why = f"refuses: {code}" if answered else self.lost or f"no answer within {_ANSWER:.0f} s"
            self.cut()
            raise TransportError(f"broker {self._address}: {why}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.lost:
            self._client.disconnect()
        self.cut()

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Let the connection live until the condition holds, it ends or time is up; whether the condition holds."""
        deadline = time.monotonic() + seconds
        while not until():
            left = deadline - time.monotonic()
            sock = self._client.socket()
            if left <= 0 or sock is None:
                return until()
            wants_write = [sock] if self._client.want_write() else []
            pending = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
            readable, writable, _ = select.select([sock], wants_write, [], 0.0 if pending else min(left, 0.5))
            if readable or pending:
                self._client.loop_read()
            if writable:
                self._client.loop_write()
            self._client.loop_misc()
        return True

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, seconds: float = _ANSWER
    ) -> ReasonCode | None:
        """Send a message and wait for its acknowledgement; None where none comes."""
        mid = self.send(topic, payload, retain=retain)
        self.wait(lambda: ("publish", mid) in self._answers, seconds)
        codes = self._answers.get(("publish", mid))
        return None if codes is None else codes[0]

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Send a message and wait for nothing; its number."""
        return self._client.publish(topic, payload, _QOS, retain).mid

    def acknowledged(self, mids: list[int], seconds: float) -> bool:
        """Wait for the acknowledgements of what was sent."""
        return self.wait(lambda: all(("publish", mid) in self._answers for mid in mids), seconds)

    def subscribe(self, topics: list[str]) -> list[bool]:
        """Subscribe in one packet; for each topic, whether the broker grants it. None are where it does not answer."""
        _, mid = self._client.subscribe([(topic, _QOS) for topic in topics])
        self.wait(lambda: ("subscribe", mid or 0) in self._answers, _ANSWER)
        return [not code.is_failure for code in self._answers.get(("subscribe", mid or 0), [])]

    def unsubscribe(self, topics: list[str]) -> None:
        """Unsubscribe in one packet."""
        self._client.unsubscribe(topics)

    def take(self, count: int, seconds: float) -> list[Heard]:
        """The next ``count`` messages, fewer where no further one has come for ``seconds``."""
        while len(self.heard) < count:
            have = len(self.heard)
            if not self.wait(lambda have=have: len(self.heard) > have, seconds):  # type: ignore[misc]
                break
        return [self.heard.popleft() for _ in range(min(count, len(self.heard)))]

    def acknowledge(self, message: Heard) -> None:
        """Acknowledge a message, of a connection that does so by hand."""
        self._client.ack(message.number, _QOS)

    def cut(self) -> None:
        """Let the connection fall without a word, as a power cut would."""
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            self._client._sock_close()
        self.lost = self.lost or "closed"

    def _connected(self, _c: mqtt.Client, _u: Any, _f: Any, code: ReasonCode, properties: Properties | None) -> None:
        self.largest_packet = getattr(properties, "MaximumPacketSize", None)
        self._answer("connect", 0, [code])

    def _disconnected(self, _c: mqtt.Client, _u: Any, _f: Any, code: ReasonCode, _p: Any) -> None:
        said = str(code) if self._client.alert is None else explain(self._client.alert)
        self.lost = f"connection ended: {said}"

    def _message(self, _c: mqtt.Client, _u: Any, message: mqtt.MQTTMessage) -> None:
        self.heard.append(Heard(message.topic, bytes(message.payload), message.mid))

    def _answer(self, kind: str, mid: int, codes: list[ReasonCode]) -> None:
        self._answers[kind, mid] = codes


def _without_delay(_c: mqtt.Client, _u: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
