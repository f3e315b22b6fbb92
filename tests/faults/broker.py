"""A model of an MQTT broker and of the ways to it, with the faults that real ones have.

QoS 1 as brokers give it: a message that was accepted may still be lost (a full queue, an access rule, a restart), may
come twice, and may come after a later one. A connection is a new session; what was under way on an old one is gone.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_client.transport import Handler
from edge_client.wire.messages import Traffic
from tests.faults.world import World

_APART = 1e-6
"""Seconds between two messages on one connection: what is due at one time, the event loop may do in any order."""
KEEPALIVE = 45.0
"""Seconds of silence after which broker and client give a connection up."""


@dataclass
class Air:
    """What happens to messages on one way now; probabilities of a message, latencies in seconds."""

    latency: tuple[float, float] = (0.001, 0.05)
    loss: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    bandwidth: float = 0.0
    """Bytes a second; 0 is no limit."""
    cut_until: float = 0.0
    """No byte goes through before; what is sent waits, and the connection breaks if that lasts."""


class SimLink:
    """One node's connection to the broker: the `Link` of the simulator."""

    def __init__(
        self, world: World, broker: "SimBroker", name: str, rng: random.Random, will: tuple[str, bytes] | None = None
    ) -> None:
        self.world, self.broker, self.name, self.rng, self.will = world, broker, name, rng, will
        self.air = broker.air_of(name)
        self.dead = False
        self.queued = 0
        self.filters: dict[str, None] = {}
        self.session = 0
        self.up = False
        self.tap: Callable[[str, bytes, bool], None] = lambda topic, payload, retain: None
        """Sees what the node publishes, before any fault."""
        self._handler: Handler | None = None
        self._sent = self._received = 0
        self._lost = asyncio.Event()
        self._over = asyncio.Event()
        self._upward = self._downward = 0.0

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._sent, self._received)

    @property
    def settled(self) -> bool:
        return self.up and self.world.now >= self._upward

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.up and not self.dead:
            self.tap(topic, payload, retain)
            self._sent += len(payload) + len(topic)
            self._send(len(payload), self.broker.published, self, topic, payload, retain)

    def subscribe(self, topics: tuple[str, ...]) -> None:
        if self.up and not self.dead and topics:
            self._send(0, self.broker.subscribed, self, topics)

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        if self.up and not self.dead and topics:
            self._send(0, self.broker.unsubscribed, self, topics)

    async def run(self, handler: Handler) -> None:
        self._handler = handler
        short = 0
        while not self._over.is_set():
            await asyncio.sleep(self._delay())
            if self.dead or self._over.is_set():
                return
            began = self.world.now
            if self.broker.up and self.world.now >= self.air.cut_until:
                self._lost.clear()
                self.session += 1
                self.up, self._upward, self._downward = True, 0.0, 0.0
                self.broker.attach(self)
                handler.connected()
                await self._lost.wait()
            if self._over.is_set() or self.dead:
                return
            short = 0 if self.world.now - began >= 10 else short + 1
            handler.disconnected("connection lost")
            pause = min(60.0, 2.0 ** min(max(short - 1, 0), 10)) * self.rng.uniform(0.5, 1.0)
            try:
                await asyncio.wait_for(self._over.wait(), pause)
            except TimeoutError:
                continue

    def drop(self) -> None:
        """The connection breaks; the broker says the last will when it notices."""
        if not self.up:
            return
        self._leave()
        if self.will is not None:
            self.world.later(self.rng.choice((0.1, KEEPALIVE)), self.broker.publish_will, *self.will)

    async def close(self) -> None:
        self._over.set()
        if self.dead or not self.up:
            return
        await asyncio.sleep(max(0.1, self._upward - self.world.now))
        self._leave()

    def kill(self) -> None:
        """The node is gone."""
        self.drop()
        self.dead = True
        self._over.set()

    def arrive(self, session: int, topic: str, payload: bytes) -> None:
        """The broker's message reaches the node."""
        if session != self.session or not self.up or self.dead:
            return
        self.queued -= 1
        if any(_matches(wanted, topic) for wanted in self.filters):
            self._received += len(payload) + len(topic)
            assert self._handler is not None
            self._handler.message(topic, payload)

    def deliver(self, topic: str, payload: bytes) -> None:
        """The broker has a message for this node."""
        air, rng = self.air, self.rng
        if self.queued >= self.broker.limit:
            self.world.strike("overflow", self.name)
            return
        if air.loss and rng.random() < air.loss:
            self.world.strike("loss", self.name)
            return
        copies = 1
        if air.double and rng.random() < air.double:
            self.world.strike("duplication", self.name)
            copies = 2
        for _ in range(copies):
            at = max(self._downward + _APART, self.air.cut_until, self.world.now + self._delay())
            if air.bandwidth:
                at += len(payload) / air.bandwidth
            if air.reorder and rng.random() < air.reorder:
                self.world.strike("reordering", self.name)
                late = at + rng.uniform(0.1, 20.0)
            else:
                self._downward = late = at
            self.queued += 1
            self.broker.deepest[self.name] = max(self.broker.deepest[self.name], self.queued)
            self.world.later(late - self.world.now, self.arrive, self.session, topic, payload)

    def _send(self, size: int, call: Callable[..., None], *arguments: object) -> None:
        at = max(self._upward + _APART, self.air.cut_until, self.world.now + self._delay())
        if self.air.bandwidth:
            at += size / self.air.bandwidth
        self._upward = at
        self.world.later(at - self.world.now, self._sent_to_broker, self.session, call, arguments)

    def _sent_to_broker(self, session: int, call: Callable[..., None], arguments: tuple[object, ...]) -> None:
        # What was under way when the connection broke is lost.
        if session == self.session and self.up:
            call(*arguments)

    def _delay(self) -> float:
        return self.rng.uniform(*self.air.latency)

    def _leave(self) -> None:
        self.broker.detach(self)
        self.up, self.queued = False, 0
        self.filters.clear()
        self._lost.set()


@dataclass
class SimBroker:
    """One broker; ``limit`` is the most messages that wait for one subscriber."""

    world: World
    limit: int = 1000
    up: bool = True
    retained: dict[str, bytes] = field(default_factory=dict)
    deepest: Counter[str] = field(default_factory=Counter)
    """By node, the most messages that waited for it at once."""
    history: list[tuple[str, bytes]] = field(default_factory=list)
    """What was published lately, for whoever replays it."""
    _airs: dict[str, Air] = field(default_factory=dict)
    _links: dict[SimLink, None] = field(default_factory=dict)
    _exact: dict[str, dict[SimLink, None]] = field(default_factory=dict)
    _wide: dict[SimLink, None] = field(default_factory=dict)

    def air_of(self, name: str) -> Air:
        """The way between a node and the broker: it outlives the node's connections."""
        return self._airs.setdefault(name, Air())

    def attach(self, link: SimLink) -> None:
        self._links[link] = None

    def detach(self, link: SimLink) -> None:
        self._links.pop(link, None)
        self._wide.pop(link, None)
        for wanted in link.filters:
            self._exact.get(wanted, {}).pop(link, None)

    def subscribed(self, link: SimLink, topics: tuple[str, ...]) -> None:
        for wanted in topics:
            link.filters[wanted] = None
            if wanted.endswith("#"):
                self._wide[link] = None
            else:
                self._exact.setdefault(wanted, {})[link] = None
            for topic in (
                [known for known in self.retained if _matches(wanted, known)] if wanted[-1] == "#" else [wanted]
            ):
                if topic in self.retained:
                    link.deliver(topic, self.retained[topic])

    def unsubscribed(self, link: SimLink, topics: tuple[str, ...]) -> None:
        for wanted in topics:
            link.filters.pop(wanted, None)
            self._exact.get(wanted, {}).pop(link, None)

    def published(self, link: SimLink, topic: str, payload: bytes, retain: bool) -> None:
        """A node's message has come; it is acknowledged, whatever becomes of it."""
        if link.air.loss and not retain and link.rng.random() < link.air.loss:
            self.world.strike("loss", link.name)
            return
        self.history.append((topic, payload))
        del self.history[:-500]
        self.route(topic, payload, retain=retain)

    def route(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message to whoever has subscribed; keep a retained one, or clear it when it is empty."""
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        if payload:
            for link in [*self._exact.get(topic, ()), *self._wide]:
                if any(_matches(wanted, topic) for wanted in link.filters):
                    link.deliver(topic, payload)

    def publish_will(self, topic: str, payload: bytes) -> None:
        """Say a last will."""
        if self.up:
            self.route(topic, payload)

    def stop(self, *, forget: bool) -> None:
        """The broker goes down; ``forget``: retained messages are gone."""
        self.up = False
        for link in list(self._links):
            link.drop()
        if forget:
            self.retained.clear()

    def start(self) -> None:
        """The broker is back."""
        self.up = True

    def cut(self, name: str, seconds: float) -> None:
        """Messages of one node wait for so long; a connection that hangs for too long breaks."""
        self.air_of(name).cut_until = self.world.now + seconds
        for link in list(self._links):
            if link.name == name:
                self.world.later(KEEPALIVE, self._hangs, link, link.session)

    def _hangs(self, link: SimLink, session: int) -> None:
        if link.session == session and self.world.now < link.air.cut_until:
            link.drop()

    def break_off(self, name: str) -> None:
        """The connection of one node breaks."""
        for link in list(self._links):
            if link.name == name:
                link.drop()


def _matches(wanted: str, topic: str) -> bool:
    return topic == wanted or (wanted.endswith("#") and topic.startswith(wanted[:-1]))
