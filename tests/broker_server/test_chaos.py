"""Real sessions and a real coordinator on a virtual clock, over a channel that loses, doubles and reorders messages,
while clients and the server crash: whatever happens, every update counts once and the run ends."""

import heapq
import itertools
import random
from typing import Any

import pytest

from broker_server import events as e
from broker_server.coordinator import Coordinator
from edge_client import events as c
from edge_client.held import Held, SessionSettings
from edge_client.session import ClientSession
from edge_client.upload import Pending
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import BUNDLE, NAME, TOPICS, Paper, digest, settings, update

CLIENTS = [f"c{number}" for number in range(6)]
ROUNDS = 4
CONFIG = settings(
    round={"cohort": 3, "over_select": 1.4, "minimum": 2, "deadline": 120.0},
    evaluation={"data": "held out", "clients": 2, "every": 2, "deadline": 60.0},
    transfer={"window": 2, "uploads": 2, "chunk": 1024},
    stop={"rounds": ROUNDS},
)


class World:
    """Everything that happens, in the order of its time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now, self.queue, self.ids = 0.0, [], itertools.count()
        self.paper, self.retained = Paper(delta_bytes=self.rng.choice([100, 3000])), {}
        self.held = {name: Held(BUNDLE.sha256, 0, digest(0), samples=10) for name in CLIENTS}
        self.settled: dict[tuple[str, tuple[int, int]], str] = {}
        self.subscribed: dict[str, set[str]] = {}
        self.sessions: dict[str, ClientSession] = {}
        self.loss, self.stopped, self.life = self.rng.choice([0.0, 0.1, 0.3]), False, 0
        self.serve()
        for name in CLIENTS:
            self.boot(name)
        for _ in range(self.rng.randrange(4)):
            self.later(self.rng.uniform(0, 400), self.crash, self.rng.choice(CLIENTS))
        for _ in range(self.rng.randrange(3)):
            self.later(self.rng.uniform(0, 400), self.serve)

    def later(self, delay: float, call: Any, *arguments: Any) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.ids), call, arguments))

    def send(self, call: Any, *arguments: Any) -> None:
        for _ in range(1 + (self.rng.random() < self.loss / 2)):
            if self.rng.random() >= self.loss:
                self.later(self.rng.expovariate(2.0), call, *arguments)

    def run(self) -> None:
        while not self.stopped:
            self.now, _, call, arguments = heapq.heappop(self.queue)
            assert self.now < 20_000, "the run does not end"
            call(*arguments)
        while self.work:  # as the driver does before it ends
            self.step(self.life)

    # The server, whose worker answers late; a crash loses what its worker has not done.

    def serve(self) -> None:
        self.life += 1
        restored = self.paper.start()
        self.server, self.work = Coordinator(CONFIG, restored), []
        for event in self.paper.replay(restored):
            self.feed(self.life, event)
        self.feed(self.life, e.Connected())

    def feed(self, life: int, event: e.Event) -> None:
        if life != self.life:
            return
        for action in self.server.handle(event, self.now):
            match action:
                case e.Publish(topic, payload):
                    self.send(self.down, topic.split("/")[3], topic, payload)
                case e.Retain(topic, payload):
                    self.retain(topic, payload)
                case e.Stop():
                    self.stopped = True
                case e.Log() | e.Subscribe():
                    pass
                case _:
                    self.work.append(action)
                    self.later(self.rng.uniform(0, 0.5), self.step, life)
        if self.server.wake is not None:
            assert self.server.wake > self.now or not isinstance(event, e.Tick)
            self.later(max(0.0, self.server.wake - self.now), self.tick, life)

    def tick(self, life: int) -> None:
        if life == self.life and self.server.wake is not None and self.server.wake <= self.now:
            self.feed(life, e.Tick())

    def step(self, life: int) -> None:
        if life != self.life:
            return
        action = self.work.pop(0)
        if isinstance(action, e.Spread):
            data = self.paper.blobs.get(action.ref.sha256, b"")
            for index in range(transfer.count(action.ref)) if action.indices is None else action.indices:
                self.retain(TOPICS.published(action.ref.sha256, index), transfer.piece(data, action.ref, index))
        elif (answer := self.paper.perform(action)) is not None:
            self.feed(life, answer)

    def retain(self, topic: str, payload: bytes) -> None:
        self.retained[topic] = payload
        for name, topics in self.subscribed.items():
            if topic in topics:
                self.later(self.rng.expovariate(2.0), self.down, name, topic, payload)

    # The clients; a crash leaves what the store holds, and the last will comes when it may.

    def boot(self, name: str) -> None:
        self.subscribed[name] = set()
        own = SessionSettings(name, NAME, chunk=1024, inline=self.rng.choice([0, 1024]))
        boot = self.rng.randbytes(8)
        self.sessions[name] = ClientSession(own, self.held[name], random.Random(boot), boot)
        self.happen(name, boot, c.Connected())

    def crash(self, name: str) -> None:
        self.send(self.up, self.sessions[name].goodbye())
        self.boot(name)

    def up(self, said: c.Publish) -> None:
        self.feed(self.life, e.Received(said.topic, said.payload))

    def down(self, name: str, topic: str, payload: bytes) -> None:
        self.happen(name, self.sessions[name].boot, c.Received(topic, payload))

    def happen(self, name: str, boot: bytes, event: c.Event) -> None:
        session = self.sessions[name]
        if session.boot != boot:
            return
        for action in session.handle(event, self.now):
            match action:
                case c.Publish():
                    self.send(self.up, action)
                case c.Subscribe(topics):
                    self.subscribed[name].update(topics)
                    for topic in topics:
                        if topic in self.retained:
                            self.later(self.rng.expovariate(2.0), self.down, name, topic, self.retained[topic])
                case c.Unsubscribe(topics):
                    self.subscribed[name].difference_update(topics)
                case c.Work(invitation):
                    self.later(self.rng.expovariate(0.1), self.train, name, boot, invitation)
                case c.Settle(epoch, task, recorded):
                    if (pending := self.held[name].pending) and (pending.epoch, pending.task) == (epoch, task):
                        held = self.held[name]
                        self.held[name] = Held(held.bundle, held.version, held.digest, None, 10)
                        self.settled[name, (epoch, task)] = "recorded" if recorded else "not recorded"
        if session.wake is not None:
            self.later(max(0.0, session.wake - self.now), self.nudge, name, boot)

    def nudge(self, name: str, boot: bytes) -> None:
        session = self.sessions[name]
        if session.boot == boot and session.wake is not None and session.wake <= self.now:
            self.happen(name, boot, c.Tick())

    def train(self, name: str, boot: bytes, task: m.Invitation) -> None:
        if self.sessions[name].boot != boot:
            return
        data = update(self.rng.randrange(1, 50), sum_count=1).ljust(self.rng.choice([50, 5000]))
        self.held[name] = Held(BUNDLE.sha256, task.version, task.digest, Pending(task.epoch, task.task, data), 10)
        self.happen(name, boot, c.Finished(task.epoch, task.task, data, task.version, task.digest))


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 300, 50)], ids=str)
def test_every_update_counts_once_and_the_run_ends(seeds):
    for seed in seeds:
        world = World(seed)
        world.run()
        paper = world.paper
        assert list(paper.rounds) == list(range(1, ROUNDS + 1)), seed
        assert paper.version == ROUNDS, seed
        assert [("accuracy" in paper.rounds[n].metrics) for n in paper.rounds] == [False, True] * 2, seed
        assert (paper.unfinished, paper.best) == (None, ROUNDS), seed
        counted = [one for version in paper.counted for one in version]
        assert len(counted) == len(set(counted)), seed
        assert [len(version) for version in paper.counted] == [paper.rounds[n].clients for n in paper.rounds], seed
        assert all(2 <= len(version) <= 6 for version in paper.counted), seed
        assert paper.sums == [result.samples for result in paper.rounds.values()], seed
        for (name, identity), fate in world.settled.items():
            if paper.outcomes.get(identity) != "void":
                assert (fate == "recorded") == (name in paper.updates[identity]), seed


def test_a_run_repeats_from_its_seed():
    first, second = World(7), World(7)
    first.run()
    second.run()
    assert (first.now, first.paper) == (second.now, second.paper)
