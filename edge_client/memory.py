"""A broker and links in memory: the twin of `edge_client.transport`, for tests and for simulations without sockets."""

import asyncio

from edge_client.transport import Handler
from edge_client.wire.messages import Traffic


class MemoryBroker:
    """A broker without sockets: exact topics, filters with ``#`` or ``+``, retained messages, last wills."""

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

    @property
    def settled(self) -> bool:
        """Whether the broker has everything that was published: it does at once, while there is a connection."""
        return self._handler is not None

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
    if "+" in wanted:
        levels, parts = wanted.split("/"), topic.split("/")
        return len(levels) == len(parts) and all(
            level in ("+", part) for level, part in zip(levels, parts, strict=True)
        )
    return topic == wanted or (wanted.endswith("#") and topic.startswith(wanted[:-1]))
