"""The state machine of a federation without rounds (FedBuff, Nguyen et al. 2022): events in, actions out.

Clients train all the time, ``round.concurrency`` of them at once, each from the version that is the newest when it is
asked. What they send is recorded and added up as it comes, discounted by how many versions it is old; each
``round.buffer`` updates make the next version. Every task has one client (see ``flights``).

A version is made and measured before the next one is made; the updates that come meanwhile go into the next one.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.conversation import Conversation
from broker_server.flights import Flight, Flights, Identity
from broker_server.rates import tolerance
from broker_server.records import Task
from broker_server.selection import Candidate, select
from broker_server.tally import Tally
from edge_client.terminal import printable
from edge_client.wire import messages as m
from edge_client.wire.topics import Chunk

_VOID = (
    "this task is over without an update: it was refused or given up before, or is more versions old than "
    "round.max_staleness, {most}, allows"
)


@dataclass
class Buffer:
    """The updates that the next version is made of, so far; ``version`` is the one before it."""

    version: int
    tally: Tally = field(default_factory=Tally)
    tasks: list[Identity] = field(default_factory=list)
    clients: set[str] = field(default_factory=set)
    _age: int = 0

    def add(self, task: Task, event: e.Recorded) -> None:
        """One more update is recorded."""
        self.tally.add(event.samples, event.scalars)
        self.tasks.append((task.epoch, task.task))
        self.clients.add(event.client)
        self._age += self.version - task.version

    @property
    def staleness(self) -> float:
        """How many versions old the updates are, on average."""
        return self._age / max(1, self.tally.results)


@dataclass
class Evaluation:
    """Clients evaluate a version, each in a task of its own, at most until the deadline."""

    deadline: float
    tally: Tally = field(default_factory=Tally)
    tasks: list[Identity] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)


@dataclass
class AsynchronousCoordinator(Conversation):
    """One federation in buffered mode; see `Conversation` for what it does not do."""

    _flights: Flights = field(init=False)
    _buffer: Buffer = field(init=False)
    _unanswered: dict[Identity, Task] = field(init=False)
    """Tasks of earlier servers whose update, where there is one, has not been added up again."""
    _evaluation: Evaluation | None = field(init=False, default=None)
    _resting: set[str] = field(init=False, default_factory=set)
    """Clients that could not do their task: not asked again before they say hello or there is a new version."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flights = Flights(self.settings, self.restored.update_limit, self.voice)
        self._buffer = Buffer(self._version)
        self._unanswered = {(task.epoch, task.task): task for task in self.restored.open_tasks}

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""
        times = [self._silence, self._flights.wake]
        if self._evaluation is not None and self._evaluation.deadline < math.inf:
            times.append(self._evaluation.deadline)
        if self.phase in ("waiting", "evaluate") and self._connected and self._gather:
            times.append(self._gather)
        return min((time for time in times if time is not None), default=None)

    def _answered(self, event: e.Event, now: float) -> Iterator[e.Action]:
        match event:
            case e.Opened(epoch, task):
                for flight in self._flights:
                    if flight.identity == (epoch, task) and flight.state == "opening":
                        self._flights.ask(flight, now)
                        yield from self._invite(flight)
            case e.Recorded(epoch, task, client):
                yield self._tell(client, m.Receipt(epoch, task, "recorded"))
                if found := self._flights.find(epoch, task, client):
                    yield from self._recorded(found, event, now)
                    yield from self._go_on(now)
                elif restored := self._unanswered.pop((epoch, task), None):
                    self._buffer.add(restored, event)
            case e.Refused(epoch, task, client, reason):
                if self._flights.find(epoch, task, client):
                    self._resting.add(client)
                    yield from self._flights.refuse(client, reason, now)
                    yield from self._go_on(now)
            case e.Damaged(epoch, task, client):
                if self._flights.find(epoch, task, client):
                    yield from self._flights.damaged(client, now)
                    if client not in self._flights:
                        self._resting.add(client)
                    yield from self._go_on(now)
            case e.Answered(epoch, task, client, "void"):
                detail = _VOID.format(most=self.settings.round.max_staleness)
                yield self._tell(client, m.Receipt(epoch, task, "refused", detail))
            case e.Answered(epoch, task, client, status):
                yield self._tell(client, m.Receipt(epoch, task, status))
            case e.Prepared(held, version, ref):
                spread, waiting = self._flights.prepared((held, version), ref)
                yield from spread
                for flight in waiting:
                    yield from self._invite(flight)

    def _recorded(self, flight: Flight, event: e.Recorded, now: float) -> Iterator[e.Action]:
        task = flight.task
        if task.kind == "train":
            self._buffer.add(task, event)
        elif self._evaluation is not None:
            self._evaluation.tally.add(event.samples, event.scalars)
            self._evaluation.tasks.append(flight.identity)
        self._roster.voids.pop(event.client, None)
        if member := self._roster.get(event.client):
            member.version, member.digest = task.version, self._digests[task.version]
        yield from self._flights.recorded(event.client, now)

    # The start of an epoch.

    def _repeat(self) -> Iterator[e.Action]:
        for delta in self._flights.blobs():
            yield e.Spread(delta)
        for flight in self._flights:
            if flight.state == "asked":
                yield from self._invite(flight)

    def _resume(self, now: float) -> Iterator[e.Action]:
        for task in self._unanswered.values():
            self._flights.restore(task, now)
        self._flights.resume(self.restored.uploads)
        self._unanswered.clear()
        if self._round.result is not None:
            self._round.begin(now)
            yield from self._measure(now)

    # What clients say.

    def _chunk(self, client: str, chunk: Chunk, payload: bytes, now: float) -> Iterator[e.Action]:
        yield from self._flights.chunk(client, chunk.sha256, chunk.index, payload, now)
        yield from self._go_on(now)

    def _uploads(self, client: str, upload: m.Upload, now: float) -> Iterator[e.Action]:
        if flight := self._flights.find(upload.epoch, upload.task, client):
            yield from self._flights.announce(flight, upload.blob, now)
            yield from self._go_on(now)
        else:
            yield from self._inquire(client, upload)

    def _declines(self, client: str, decline: m.Decline, now: float) -> Iterator[e.Action]:
        flight = self._flights.find(decline.epoch, decline.task, client)
        if flight is not None and flight.state in ("asked", "away"):
            yield e.Log(f"{client} declines task {decline.task}: {printable(decline.reason)}")
            self._resting.add(client)
            yield from self._flights.end(client, now)
            yield from self._go_on(now)

    def _disowned(self, client: str, now: float) -> Iterator[e.Action]:
        yield from self._flights.disown(client, now)

    def _leaves(self, client: str, now: float) -> Iterator[e.Action]:
        yield from self._flights.leave(client, now)
        yield from self._go_on(now)

    def _comes(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        self._resting.discard(client)
        flight = self._flights.of(client)
        if flight is not None and flight.state in ("asked", "away") and hello.available:
            if self._lost(flight, hello):
                yield from self._flights.end(client, now)
            else:
                self._flights.ask(flight, now)
                yield from self._invite(flight)
        yield from self._consider(now)

    def _lost(self, flight: Flight, hello: m.Hello) -> bool:
        """Whether a client's new life knows nothing of its task: it better begins one from the newest version.

        One that had finished it would hold its version; one in the life that was asked may be at it still.
        """
        held = hello.version, hello.digest
        another = flight.boot not in (b"", hello.boot)
        return another and held != (flight.task.version, self._digests[flight.task.version])

    def _blobs(self) -> list[m.BlobRef]:
        return self._flights.blobs()

    # Going on.

    def _tick(self, now: float) -> Iterator[e.Action]:
        yield from self._flights.tick(now)
        yield from self._consider(now)

    def _consider(self, now: float) -> Iterator[e.Action]:
        if self._connected and self.phase == "waiting":
            reason = self._progress.reason()
            if reason is not None:
                yield from self._stop(reason, now)
            elif self._roster.present() >= (self.settings.round.quorum if self._young else 1):
                self.phase = "train"
                self._round.begin(now)
        yield from self._go_on(now)

    @property
    def _young(self) -> bool:
        """Whether clients are still expected to come: at the beginning, and for a while after a restart."""
        return not self._progress.rounds or bool(self._gather)

    def _go_on(self, now: float) -> Iterator[e.Action]:
        """Record what has come, make a version of it where it is enough, and keep clients busy."""
        if self.phase == "train":
            # No more than the version takes: what comes beyond waits for it, at most as long as a commit takes.
            have, coming = self._buffer.tally.results, self._flights.count("train", "recording")
            yield from self._flights.record(self.settings.round.buffer - have - coming)
            if have >= self.settings.round.buffer and not coming:
                yield from self._advance(now)
        if self.phase != "train":
            yield from self._flights.record()
        if self._evaluation is not None:
            yield from self._evaluate(self._evaluation, now)
        if self._connected and self.phase in ("train", "measure", "evaluate"):
            yield from self._fill(self.settings.round.concurrency - self._flights.count("train"))

    def _advance(self, now: float) -> Iterator[e.Action]:
        done, version = self._buffer, self._version + 1
        self._round.trained(done.tally, version)
        self._round.measured({"staleness": done.staleness})
        assert self._round.result is not None
        self._buffer = Buffer(version)
        self._resting.clear()
        yield from self._flights.expire(version, now)
        yield from self._aggregate(tuple(done.tasks), self._round.result, self._flights.versions)

    def _fill(self, slots: int) -> Iterator[e.Action]:
        """Have clients train: those whose updates wait for the same version already only where there are no others."""
        if slots > 0:
            free = self._free()
            chosen = self._draw([candidate for candidate in free if candidate.id not in self._buffer.clients], slots)
            again = [candidate for candidate in free if candidate.id in self._buffer.clients]
            yield from self._launch("train", chosen + self._draw(again, slots - len(chosen)))

    def _draw(self, free: list[Candidate], count: int) -> list[str]:
        rng = random.Random(f"{self.settings.federation.seed}/{self._version}/{self._task}")  # noqa: S311
        return select(free, count, rng)

    def _launch(self, kind: Literal["train", "evaluate"], clients: list[str]) -> Iterator[e.Action]:
        plan = b""
        if clients and kind == "train":
            samples = [candidate.samples for candidate in self._roster.candidates()]
            plan = tolerance(self.settings, self._pace, samples, self.settings.round.buffer)
        for client in clients:
            member = self._roster.get(client)
            assert member is not None
            self._task += 1
            task = Task(
                epoch=self.restored.epoch,
                task=self._task,
                round=self._version + 1,
                kind=kind,
                version=self._version,
                cohort=(client,),
                plan=plan,
                opened=0.0,
            )
            yield from self._flights.launch(task, member.boot)

    def _free(self) -> list[Candidate]:
        return [
            candidate
            for candidate in self._roster.candidates()
            if candidate.available and candidate.id not in self._flights and candidate.id not in self._resting
        ]

    def _invite(self, flight: Flight) -> Iterator[e.Action]:
        """Invite a client that is there; what is said without a connection is said again once there is one."""
        member = self._roster.get(flight.task.cohort[0])
        if self._connected and member is not None:
            void = self._roster.voids.get(flight.task.cohort[0])
            yield from self._flights.invite(flight, member, self._digests, void)

    # Evaluation by clients.

    def _ask_clients(self, now: float) -> Iterator[e.Action]:
        if self.settings.evaluation.clients and (self._roster.present() or self._gather):
            self.phase = "evaluate"
            self._evaluation = Evaluation(now + self.settings.evaluation.deadline)
            yield from self._go_on(now)
        else:
            yield from self._finish(now)

    def _evaluate(self, evaluation: Evaluation, now: float) -> Iterator[e.Action]:
        """Ask clients as they become free, until enough have answered or there is no more time."""
        if now >= evaluation.deadline:
            evaluation.deadline = math.inf
        late = evaluation.deadline == math.inf
        missing = self.settings.evaluation.clients - evaluation.tally.results
        if not late and self._connected:
            free = [candidate for candidate in self._free() if candidate.id not in evaluation.asked]
            chosen = self._draw(free, missing - self._flights.count("evaluate"))
            evaluation.asked.update(chosen)
            yield from self._launch("evaluate", chosen)
        # Those who train may be asked once they are done.
        nobody = not (self._gather or self._flights.count("evaluate") or self._flights.count("train"))
        if (late or missing <= 0 or nobody) and not self._flights.count("evaluate", "recording"):
            self._evaluation = None
            for identity in evaluation.tasks:
                yield e.CloseTask(*identity, "done")
            for flight in self._flights:
                if flight.task.kind == "evaluate":
                    yield from self._flights.end(flight.task.cohort[0], now)
            self._round.tested(evaluation.tally)
            yield from self._finish(now)
