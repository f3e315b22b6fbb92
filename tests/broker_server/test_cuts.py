"""A large model over a slow link that is cut every 20 seconds: real sessions and a real coordinator on a virtual clock.

``FEDGE_CUTS_MB=200`` takes the size that the design promises; the default shows the same in a few seconds.
"""

import dataclasses
import heapq
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

from broker_server import events as e
from broker_server.coordinator import Coordinator
from edge_client import events as c
from edge_client.held import Held, SessionSettings
from edge_client.session import ClientSession
from edge_client.upload import Pending
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import NAME, TOPICS, Paper, digest, settings, update

SIZE = int(os.environ.get("FEDGE_CUTS_MB", "20")) * 1_000_000
RATE = 250_000.0
"""Bytes a second in each direction."""
LATENCY, CUT, GAP = 0.1, 20.0, 1.0
CONFIG = settings(round={"cohort": 1, "minimum": 1, "deadline": 100_000.0}, stop={"rounds": 1})


class Lane:
    """One direction of the link: a message takes its bytes' time, and a cut takes what has not crossed."""

    def __init__(self, world: "World") -> None:
        self.world, self.free, self.crossed = world, 0.0, 0.0
        self.under_way: list[tuple[float, float]] = []

    def send(self, size: int, deliver: Callable[..., None], *arguments: Any) -> None:
        if not self.world.up:
            return
        begin = max(self.free, self.world.now)
        self.free = begin + size / RATE
        self.crossed += size
        self.under_way.append((begin, self.free))
        self.world.later(self.free - self.world.now + LATENCY, self.world.while_up(deliver), *arguments)

    def cut(self) -> None:
        now = self.world.now
        self.crossed -= sum((end - max(begin, now)) * RATE for begin, end in self.under_way if end > now)
        self.under_way, self.free = [], 0.0


class Large(Paper):
    """A paper ledger whose bundle is large."""

    def __init__(self, bundle: m.BlobRef) -> None:
        super().__init__()
        self.bundle = bundle

    def start(self) -> e.Restored:
        return dataclasses.replace(super().start(), bundle=self.bundle, update_limit=2 * SIZE)


class World:
    """A client, its link, a broker and a server."""

    def __init__(self) -> None:
        self.now, self.queue, self.ids, self.up, self.connection = 0.0, [], itertools.count(), False, 0
        self.rng = random.Random(11)
        self.bundle = self.rng.randbytes(SIZE)
        self.ref = transfer.refer(self.bundle, chunk=65_536)
        self.paper, self.retained, self.subscribed = Large(self.ref), {}, set()
        self.uplink, self.downlink = Lane(self), Lane(self)
        self.held, self.partial = Held(), None
        self.installed: float | None = None
        self.trained: float | None = None
        self.recorded: float | None = None
        self.life = 0
        self.serve()
        self.boot()
        self.connect()

    def later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.queue, (self.now + max(0.0, delay), next(self.ids), call, arguments))

    def while_up(self, call: Callable[..., None]) -> Callable[..., None]:
        connection = self.connection
        return lambda *arguments: call(*arguments) if connection == self.connection and self.up else None

    def run(self, limit: float) -> None:
        while self.recorded is None:
            self.now, _, call, arguments = heapq.heappop(self.queue)
            assert self.now < limit, f"after {self.now:.0f} s: installed {self.installed}, trained {self.trained}"
            call(*arguments)

    # The link.

    def connect(self) -> None:
        self.up, self.connection = True, self.connection + 1
        self.happen(c.Connected())
        self.later(CUT, self.while_up(self.cut))

    def cut(self) -> None:
        self.uplink.cut()
        self.downlink.cut()
        self.up = False
        self.subscribed.clear()
        self.happen(c.Disconnected())
        will = self.session.goodbye()
        self.later(LATENCY, self.feed, e.Received(will.topic, will.payload))
        self.later(GAP, self.connect)

    # The client.

    def boot(self) -> None:
        held = dataclasses.replace(self.held, partial=self.partial)
        own = SessionSettings("pi", NAME)
        self.session = ClientSession(own, held, random.Random(self.rng.random()), self.rng.randbytes(8))

    def restart(self) -> None:
        """The client loses its power and starts again, on a link that is up."""
        if self.up:
            self.cut()
        self.boot()

    def happen(self, event: c.Event) -> None:
        session = self.session
        for action in session.handle(event, self.now):
            match action:
                case c.Publish(topic, payload):
                    self.uplink.send(len(payload) + len(topic), self.feed, e.Received(topic, payload))
                case c.Subscribe(topics):
                    self.uplink.send(sum(map(len, topics)), self.subscribe, topics)
                case c.Unsubscribe(topics):
                    self.uplink.send(sum(map(len, topics)), self.subscribed.difference_update, topics)
                case c.Keep(ref, index, data):
                    if self.partial is None or self.partial.ref != ref:
                        self.partial = transfer.Assembly(ref, limit=2 * SIZE)
                    self.partial.add(index, data)
                case c.Discard():
                    self.partial = None
                case c.Install(bundle, data):
                    assert data == self.bundle
                    self.installed, self.held = self.now, Held(bundle, 0, digest(0), samples=10)
                    self.later(0.0, self.happen, c.Installed(bundle, 10))
                case c.Work(task):
                    self.later(1.0, self.train, task)
                case c.Settle(_, _, recorded):
                    assert recorded
                    self.recorded = self.now
        if session.wake is not None:
            self.later(session.wake - self.now, self.nudge, session)

    def nudge(self, session: ClientSession) -> None:
        if session is self.session and session.wake is not None and session.wake <= self.now:
            self.happen(c.Tick())

    def train(self, task: m.Invitation) -> None:
        if self.trained is None:
            self.trained = self.now
            data = update(10).ljust(SIZE)
            pending = Pending(task.epoch, task.task, data)
            self.held = Held(self.ref.sha256, task.version, task.digest, pending, 10)
            self.happen(c.Finished(task.epoch, task.task, data, task.version, task.digest))

    # The broker.

    def subscribe(self, topics: tuple[str, ...]) -> None:
        self.subscribed.update(topics)
        for topic in topics:
            if topic in self.retained:
                self.downlink.send(len(self.retained[topic]) + len(topic), self.arrive, topic, self.retained[topic])

    def arrive(self, topic: str, payload: bytes) -> None:
        if topic in self.subscribed:
            self.happen(c.Received(topic, payload))

    # The server.

    def serve(self) -> None:
        self.life += 1
        restored = self.paper.start()
        self.server = Coordinator(CONFIG, restored)
        for event in self.paper.replay(restored):
            self.feed(event)
        self.feed(e.Connected())

    def feed(self, event: e.Event) -> None:
        server = self.server
        for action in server.handle(event, self.now):
            match action:
                case e.Publish(topic, payload):
                    self.downlink.send(len(payload) + len(topic), self.arrive, topic, payload)
                case e.Retain(topic, payload):
                    self.retained[topic] = payload
                    self.downlink.send(len(payload) + len(topic), self.arrive, topic, payload)
                case e.Spread(ref, indices):
                    assert ref == self.ref
                    for index in range(transfer.count(ref)) if indices is None else indices:
                        self.retained[TOPICS.published(ref.sha256, index)] = transfer.piece(self.bundle, ref, index)
                case _:
                    answer = self.paper.perform(action)
                    if answer is not None:
                        self.later(0.0, self.answered, server, answer)
        if server.wake is not None:
            self.later(server.wake - self.now, self.tick, server)

    def answered(self, server: Coordinator, event: e.Event) -> None:
        if server is self.server:
            self.feed(event)

    def tick(self, server: Coordinator) -> None:
        if server is self.server and server.wake is not None and server.wake <= self.now:
            self.feed(e.Tick())


def test_a_large_model_crosses_a_slow_link_that_is_cut_all_the_time_whoever_restarts():
    world = World()
    ideal = SIZE / RATE
    world.later(ideal / 2, world.restart)
    world.later(ideal * 1.5, world.serve)  # the server is killed, and starts again
    world.later(ideal * 1.9, world.restart)
    world.run(limit=4 * ideal)
    assert world.installed is not None and world.trained is not None and world.recorded is not None  # noqa: PT018
    down, up = world.downlink.crossed / SIZE, world.uplink.crossed / SIZE
    seconds = world.installed, world.recorded - world.trained
    print(
        f"{SIZE / 1e6:.0f} MB at {RATE / 1e3:.0f} kB/s, cut every {CUT:.0f} s: down in {seconds[0]:.0f} s with "
        f"{down:.3f} times its bytes, up in {seconds[1]:.0f} s with {up:.3f} times; without cuts {ideal:.0f} s"
    )
    assert world.paper.sums == [10]
    assert down < 1.1
    assert up < 1.1
    assert max(seconds) < 1.5 * ideal
