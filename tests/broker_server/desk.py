"""A coordinator on a desk: a ledger of paper instead of the worker, a clock turned by hand, clients that are strings.

An update is the JSON of its samples and scalars (`update`), or anything else, which the paper ledger refuses.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from broker_server import events as e
from broker_server.config import Federation
from broker_server.modes import coordinator
from broker_server.records import Round, Task
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Host, PlainHost

NAME = "toys"
BUNDLE = transfer.refer(b"the bundle", chunk=1024)
LIMIT = 20_000
TOPICS = Topics(NAME)
Identity = tuple[int, int]


class Update(msgspec.Struct):
    samples: int
    scalars: dict[str, float] = {}


def update(samples: int = 10, **scalars: float) -> bytes:
    return msgspec.json.encode(Update(samples, {name.replace("_", "."): value for name, value in scalars.items()}))


def digest(version: int) -> bytes:
    return hashlib.sha256(b"version %d" % version).digest()


def settings(**sections: dict[str, object]) -> Federation:
    """Settings with those of some sections replaced: ``settings(round={"cohort": 2})``."""
    base = {"federation": {"name": NAME, "bundle": "b", "seed": 1}, "stop": {"rounds": 3}}
    return msgspec.convert(base | sections, Federation)


@dataclass
class Paper:
    """What a ledger and a worker do, without tensors; it survives a server."""

    delta_bytes: int = 100
    epoch: int = 0
    version: int = 0
    tasks: dict[Identity, Task] = field(default_factory=dict)
    outcomes: dict[Identity, str] = field(default_factory=dict)
    updates: dict[Identity, dict[str, Update]] = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)
    counted: list[list[tuple[Identity, str]]] = field(default_factory=list)
    """For each version after 0, the updates that it was made from."""
    sums: list[int] = field(default_factory=list)
    unfinished: int | None = None
    best: int | None = None
    fleet: int = 0
    last: dict[str, Identity] = field(default_factory=dict)
    """By client, the task of its last recorded update."""
    pace: float = 0.0
    """What is said of aggregates, once there is one."""
    issued: float = 0.0
    """The date of the newest offer."""
    kept: set[int] = field(default_factory=lambda: {0})
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    uploads: dict[tuple[Identity, str], transfer.Assembly] = field(default_factory=dict, compare=False)

    def start(self) -> e.Restored:
        self.epoch += 1
        self.blobs.clear()
        opened = [task for identity, task in self.tasks.items() if identity not in self.outcomes]
        return e.Restored(
            epoch=self.epoch,
            version=self.version,
            digest=digest(self.version),
            bundle=BUNDLE,
            update_limit=LIMIT,
            last_task=max((number for _, number in self.tasks), default=0),
            rounds=tuple(self.rounds.values()),
            unfinished=self.unfinished,
            open_tasks=tuple(opened),
            digests={task.version: digest(task.version) for task in opened},
            fleet=self.fleet,
            voids={client: identity for client, identity in self.last.items() if self.outcomes.get(identity) == "void"},
            pace=self.pace if self.version else 0.0,
            issued=self.issued,
            uploads={
                client: copy.deepcopy(blob)
                for task in opened
                for (identity, client), blob in self.uploads.items()
                if identity == (task.epoch, task.task)
            },
        )

    def replay(self, restored: e.Restored) -> Iterator[e.Recorded]:
        for task in restored.open_tasks:
            for client, known in self.updates[task.epoch, task.task].items():
                yield e.Recorded(task.epoch, task.task, client, known.samples, known.scalars)

    def perform(self, action: e.Action) -> e.Event | None:
        match action:
            case e.OpenTask(task):
                assert (task.epoch, task.task) not in self.tasks
                self.tasks[task.epoch, task.task], self.updates[task.epoch, task.task] = task, {}
                return e.Opened(task.epoch, task.task)
            case e.Enlarge(epoch, number, clients):
                task = self.tasks[epoch, number]
                self.tasks[epoch, number] = msgspec.structs.replace(task, cohort=task.cohort + clients)
                return e.Opened(epoch, number)
            case e.Keep(epoch, number, client, ref, index, data):
                blob = self.uploads.get(((epoch, number), client))
                if blob is None or blob.ref != ref:
                    blob = self.uploads[(epoch, number), client] = transfer.Assembly(ref, limit=ref.size)
                assert blob.add(index, data), "a chunk is kept once"
            case e.Record(epoch, number, client, data):
                assert (epoch, number) not in self.outcomes, "an update for a closed task would not be counted"
                if data is None:
                    try:
                        data = self.uploads.pop(((epoch, number), client)).take()
                    except WireError:
                        return e.Damaged(epoch, number, client)
                try:
                    known = msgspec.json.decode(data, type=Update)
                except msgspec.DecodeError as error:
                    return e.Refused(epoch, number, client, str(error))
                if self.updates[epoch, number].setdefault(client, known) is known:
                    self.last[client] = epoch, number
                return e.Recorded(epoch, number, client, known.samples, known.scalars)
            case e.Inquire(epoch, number, client):
                if self.outcomes.get((epoch, number)) == "void":
                    return e.Answered(epoch, number, client, "void")
                recorded = client in self.updates.get((epoch, number), {})
                return e.Answered(epoch, number, client, "recorded" if recorded else "late")
            case e.Prepare(held, version):
                assert version <= self.version
                assert {held, version} <= self.kept | {0}, f"version {held} or {version} has been forgotten"
                data = b"%d to %d" % (held, version) * (self.delta_bytes // 6)
                ref = transfer.refer(data, chunk=1024, inline=1024)
                self.blobs[ref.sha256] = data
                return e.Prepared(held, version, ref)
            case e.Aggregate(closes, result, keep):
                for identity in closes:
                    self._close(*identity, "done")
                self.counted.append([(identity, client) for identity in closes for client in self.updates[identity]])
                self.sums.append(sum(one.samples for identity in closes for one in self.updates[identity].values()))
                self.kept = (self.kept & keep) | {self.version, self.version + 1}
                self.version += 1
                assert result.version == self.version
                self.rounds[result.round], self.unfinished = result, result.round
                return e.Aggregated(self.version, digest(self.version), pace=self.pace)
            case e.CloseTask(epoch, number, outcome):
                self._close(epoch, number, outcome)
                return e.Closed(epoch, number)
            case e.Dated(issued):
                self.issued = issued
            case e.Evaluate(version):
                return e.Evaluated(version, {"accuracy": version / 10})
            case e.FinishRound(result, best, fleet):
                self.fleet = fleet
                self.rounds[result.round], self.unfinished = result, None
                self.best = result.version if best else self.best
            case e.Sweep(ref):
                del self.blobs[ref.sha256]
        return None

    def _close(self, epoch: int, number: int, outcome: str) -> None:
        assert (epoch, number) in self.tasks
        assert (epoch, number) not in self.outcomes
        self.outcomes[epoch, number] = outcome


class Desk:
    """One life of a server. Actions named in ``manual`` are not carried out until `perform` is called."""

    def __init__(
        self,
        config: Federation,
        paper: Paper | None = None,
        *,
        manual: tuple[type, ...] = (),
        voice: Callable[[int], Host] = lambda _: PlainHost(),
        wall: float = 0.0,
    ) -> None:
        self.paper = paper or Paper()
        self.manual = manual
        self.now = 1000.0
        self.actions: list[e.Action] = []
        self.waiting: list[e.Action] = []
        self.restored = self.paper.start()
        self.coordinator = coordinator(config, self.restored, voice(self.restored.epoch))
        for event in self.paper.replay(self.restored):
            self.feed(event)
        if wall:
            self.feed(e.Clock(wall))
        self.feed(e.Connected())

    def feed(self, event: e.Event) -> list[e.Action]:
        """Everything that follows from an event, the worker's answers included."""
        events, everything = [event], []
        while events:
            for action in self.coordinator.handle(events.pop(0), self.now):
                everything.append(action)
                if isinstance(action, self.manual):
                    self.waiting.append(action)
                elif (answer := self.paper.perform(action)) is not None:
                    events.append(answer)
        self.actions += everything
        # A wake-up in the past that a tick does not move would make a driver spin.
        for _ in range(3):
            if self.coordinator.wake is None or self.coordinator.wake > self.now or isinstance(event, e.Tick):
                break
            everything += self.feed(e.Tick())
        assert self.coordinator.wake is None or self.coordinator.wake > self.now
        return everything

    def perform(self) -> list[e.Action]:
        """Carry out the oldest action that waits."""
        answer = self.paper.perform(self.waiting.pop(0))
        return self.feed(answer) if answer is not None else []

    def wait(self, seconds: float) -> list[e.Action]:
        """Turn the clock, stopping at every wake-up."""
        until, everything = self.now + seconds, []
        while (wake := self.coordinator.wake) is not None and wake <= until:
            self.now = max(self.now, wake)
            everything += self.feed(e.Tick())
        self.now = until
        return everything

    def say(self, client: str, message: m.Message) -> list[e.Action]:
        return self.feed(e.Received(TOPICS.up(client), m.encode(message)))

    def hello(
        self, *clients: str, version: int = 0, state: bytes | None = None, boot: bytes = b"boot0000", **more: object
    ) -> list[e.Action]:
        everything: list[e.Action] = []
        for client in clients:
            said = m.Hello(
                self.restored.epoch,
                boot,
                BUNDLE.sha256,
                version,
                digest(version) if state is None else state,
                **{"samples": 10, "available": True, **more},  # type: ignore[arg-type]
            )
            everything += self.say(client, said)
        return everything

    def upload(self, client: str, data: bytes | None = None, *, identity: Identity | None = None) -> list[e.Action]:
        data = update() if data is None else data
        epoch, task = identity or self.task
        return self.say(client, m.Upload(epoch, task, transfer.refer(data, chunk=1024)))

    @property
    def task(self) -> Identity:
        """The last task that was opened."""
        return next(reversed(self.paper.tasks))

    @property
    def cohort(self) -> list[str]:
        return list(self.paper.tasks[self.task].cohort)


def told(actions: list[e.Action], client: str, kind: type = object) -> list[m.Message]:
    """What these actions say to a client."""
    said = [m.decode(a.payload) for a in actions if isinstance(a, e.Publish) and a.topic == TOPICS.down(client)]
    return [message for message in said if isinstance(message, kind)]


def invited(actions: list[e.Action]) -> dict[str, m.Invitation]:
    found = {}
    for action in actions:
        if isinstance(action, e.Publish):
            message = m.decode(action.payload)
            if isinstance(message, m.Invitation):
                found[action.topic.split("/")[3]] = message
    return found


def of(actions: list[e.Action], kind: type) -> list[e.Action]:
    return [action for action in actions if isinstance(action, kind)]


def status(actions: list[e.Action], client: str) -> list[str]:
    return [receipt.status for receipt in told(actions, client, m.Receipt)]  # type: ignore[attr-defined]
