"""The state machine of a federation with rounds: events in, actions out. The life of one task is in ``tasks``."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.conversation import Conversation
from broker_server.rates import tolerance
from broker_server.records import Task
from broker_server.selection import select
from broker_server.tasks import OpenTask
from edge_client.errors import WireError
from edge_client.terminal import printable
from edge_client.wire import messages as m
from edge_client.wire.topics import Chunk

_RETRY = 5.0
"""Seconds between a void round and the next attempt at it."""


@dataclass
class Coordinator(Conversation):
    """One federation in synchronous rounds; see `Conversation` for what it does not do."""

    _open: OpenTask | None = field(init=False, default=None)
    _void: dict[tuple[int, int], OpenTask] = field(init=False, default_factory=dict)
    """Tasks that are void, and not yet so in the ledger."""
    _retry: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restored.open_task is not None:
            self.phase, self._open = self.restored.open_task.kind, self._begin(self.restored.open_task)
            self._open.resume(self.restored.uploads)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""
        times = [self._silence, self._open.wake if self._open is not None else None]
        if self.phase in ("waiting", "gather") and self._connected:
            times += [time for time in (self._retry, self._gather) if time]
        return min((time for time in times if time is not None), default=None)

    def _answered(self, event: e.Event, now: float) -> Iterator[e.Action]:
        match event:
            case e.Opened(epoch, task):
                if self._open is not None and self._open.identity == (epoch, task):
                    yield from self._opened(self._open, now)
            case e.Recorded(epoch, task, client):
                yield self._tell(client, m.Receipt(epoch, task, "recorded"))
                member = self._roster.get(client)
                if open_ := self._task_of(epoch, task, client):
                    open_.recorded(event)
                    self._roster.voids.pop(client, None)
                    if member is not None:
                        member.version = open_.task.version
                        member.digest = self._digests[member.version]
                    yield from self._go_on(now)
            case e.Refused(epoch, task, client, reason):
                if open_ := self._task_of(epoch, task, client):
                    yield from open_.refuse(client, reason)
                    yield from self._go_on(now)
            case e.Damaged(epoch, task, client):
                if open_ := self._task_of(epoch, task, client):
                    yield from open_.damaged(client)
                    yield from self._go_on(now)
            case e.Answered(epoch, task, client, status):
                yield self._tell(client, m.Receipt(epoch, task, status))
            case e.Prepared(held, version, ref):
                if self._open is not None and self._open.task.version == version:
                    yield from self._open.prepared(held, ref)
                elif ref.inline is None:
                    yield e.Sweep(ref)
            case e.Closed(epoch, task):
                if void := self._void.pop((epoch, task), None):
                    self._roster.voids |= dict.fromkeys(void.contributors, void.identity)
                    yield from void.voided()

    def _repeat(self) -> Iterator[e.Action]:
        task = self._open
        if task is not None:
            for delta in task.blobs():
                yield e.Spread(delta)
            # What was said while the connection was gone is lost.
            yield from self._invite(task, task.unanswered())

    def _resume(self, now: float) -> Iterator[e.Action]:
        if self._round.result is not None and (self._open is None or self.settings.evaluation.data):
            # What was measured before is lost; clients that evaluate go on once it is measured again.
            self._round.begin(now)
            yield from self._measure(now)
        elif self._open is not None:
            yield from self._opened(self._open, now)

    # What clients say.

    def _chunk(self, client: str, chunk: Chunk, payload: bytes, now: float) -> Iterator[e.Action]:
        if self._open is None:
            raise WireError(f"chunk of an upload by {client} that is not under way")
        yield from self._open.chunk(client, chunk.sha256, chunk.index, payload, now)

    def _uploads(self, client: str, upload: m.Upload, now: float) -> Iterator[e.Action]:
        if task := self._task_of(upload.epoch, upload.task, client):
            yield from task.announce(client, upload.blob, now)
            yield from self._go_on(now)
        else:
            yield from self._inquire(client, upload)

    def _declines(self, client: str, decline: m.Decline, now: float) -> Iterator[e.Action]:
        if task := self._task_of(decline.epoch, decline.task, client):
            yield e.Log(f"{client} declines task {decline.task}: {printable(decline.reason)}")
            task.lose(client)
            yield from self._go_on(now)

    def _disowned(self, client: str, now: float) -> Iterator[e.Action]:
        if self._open is not None:
            yield from self._open.disown(client, now)

    def _leaves(self, client: str, now: float) -> Iterator[e.Action]:
        if self._open is not None:
            yield from self._open.leave(client, now)
            yield from self._go_on(now)

    def _comes(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        if self._open is not None and self._open.greet(client, available=hello.available):
            yield from self._invite(self._open, [client])
        yield from self._consider(now)
        yield from self._go_on(now)

    def _blobs(self) -> list[m.BlobRef]:
        return self._open.blobs() if self._open is not None else []

    # Tasks.

    def _begin(self, task: Task) -> OpenTask:
        spares = {candidate.id for candidate in self._roster.candidates() if candidate.available}
        limit, digests = self.restored.update_limit, dict(self._digests)
        return OpenTask(task, self.settings, digests, limit, spares - {*task.cohort}, self.voice, self.restored.run)

    def _open_task(self, kind: Literal["train", "evaluate"], count: int) -> Iterator[e.Action]:
        self._task += 1
        self.phase = kind
        rng = random.Random(f"{self.settings.federation.seed}/{self._round.number}/{self._task}")  # noqa: S311
        candidates = self._roster.candidates()
        cohort = tuple(select(candidates, count, rng))
        samples = [candidate.samples for candidate in candidates if candidate.id in {*cohort}]
        updates = min(self.settings.round.cohort, len(cohort))
        task = Task(
            epoch=self.restored.epoch,
            task=self._task,
            round=self._round.number,
            kind=kind,
            version=self._version,
            cohort=cohort,
            plan=tolerance(self.settings, self._pace, samples, updates) if kind == "train" else b"",
            opened=0.0,
        )
        self._open = self._begin(task)
        yield e.OpenTask(task)

    def _opened(self, task: OpenTask, now: float) -> Iterator[e.Action]:
        task.open(now)
        self._round.begin(now)
        yield from self._invite(task, task.uninvited())
        yield from self._go_on(now)

    def _invite(self, task: OpenTask, clients: Iterable[str]) -> Iterator[e.Action]:
        for client in clients:
            member = self._roster.get(client)
            if member is not None:
                member.last_round = task.task.round
                void = self._roster.voids.get(client)
                yield from task.invite(client, member.version, member.digest, member.uplink, void, member.samples)

    def _go_on(self, now: float) -> Iterator[e.Action]:
        """Ask others where members of the task are lost, and close it when it is over."""
        task = self._open
        if task is None:
            return
        yield from task.refill()
        match task.outcome(now):
            case "done":
                self._open = None
                yield from task.sweep()
                yield from self._trained(task) if task.task.kind == "train" else self._tested(task, now)
            case "void":
                self._open = None
                came = f"{task.results} of {task.fewest} updates came in time"
                yield e.Log(f"round {self._round.number}: {came}; asking again")
                self._void[task.identity] = task
                yield from task.void()
                self.phase, self._retry = "waiting", now + _RETRY

    def _trained(self, task: OpenTask) -> Iterator[e.Action]:
        result = self._round.trained(task.tally, self._version + 1)
        yield from self._aggregate((task.identity,), result, frozenset())

    def _tested(self, task: OpenTask, now: float) -> Iterator[e.Action]:
        yield e.CloseTask(*task.identity, "done")
        self._round.tested(task.tally)
        yield from self._finish(now)

    # Rounds.

    def _consider(self, now: float) -> Iterator[e.Action]:
        if not self._connected or now < self._retry:
            return
        if self.phase == "gather":
            yield from self._ask_clients(now)
            return
        if self.phase != "waiting":
            return
        reason = self._progress.reason()
        if reason is not None:
            yield from self._stop(reason, now)
            return
        rounds = self.settings.round
        quorum = rounds.quorum if not self._progress.rounds or self._gather else rounds.minimum
        if self._roster.present() < max(1, quorum):
            return
        self._round.begin(now)
        yield from self._open_task("train", rounds.invited)

    def _measure(self, now: float) -> Iterator[e.Action]:
        if self._open is None:
            yield from super()._measure(now)
        else:
            # Clients evaluate already.
            self.phase = "measure"
            yield e.Evaluate(self._version)

    def _ask_clients(self, now: float) -> Iterator[e.Action]:
        wanted, present = self.settings.evaluation.clients, self._roster.present()
        if self._open is not None:
            self.phase = "evaluate"
            yield from self._opened(self._open, now)
        elif self._gather and present < wanted:
            self.phase = "gather"
        elif wanted and present:
            yield from self._open_task("evaluate", wanted)
        else:
            yield from self._finish(now)

    def _finish(self, now: float) -> Iterator[e.Action]:
        self._retry = 0.0
        yield from super()._finish(now)

    def _tick(self, now: float) -> Iterator[e.Action]:
        if now >= self._retry:
            self._retry = 0.0
        if self._open is not None:
            yield from self._open.tick(now)
        yield from self._go_on(now)
        yield from self._consider(now)

    # Small things.

    def _task_of(self, epoch: int, task: int, client: str) -> OpenTask | None:
        """The open task, where it is this one and the client is a member."""
        open_ = self._open
        return open_ if open_ is not None and open_.identity == (epoch, task) and client in open_ else None
