"""The federation's state machine: events in, actions out.

It does no I/O, reads no clock and draws its randomness from the federation's seed. It holds ids, never tensors:
decoding, aggregating, evaluating and writing to the ledger are actions, done by a worker, whose results come back as
events.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.config import Federation
from broker_server.ledger import Round, Task
from broker_server.roster import Member, Roster
from broker_server.selection import select
from broker_server.stopping import Progress
from broker_server.tasks import OpenTask, State
from broker_server.uploads import Grant, Uploads
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics

Phase = Literal["waiting", "train", "aggregate", "measure", "evaluate", "stopped"]
_RETRY = 5.0
"""Seconds between a void round and the next attempt at it."""
_GATHER = 10.0
"""Seconds, beside the spread, in which a fleet may come back after a restart; then a round begins with who is there."""


@dataclass(frozen=True)
class Restored:
    """What the ledger knows when the server starts."""

    epoch: int
    version: int
    digest: bytes
    bundle: m.BlobRef
    update_limit: int
    """Bytes of the largest update."""
    last_task: int = 0
    rounds: tuple[Round, ...] = ()
    open_task: Task | None = None
    """The task that was under way; its recorded updates follow as Recorded events."""
    started: float = 0.0
    """Seconds that earlier runs of the server took."""


@dataclass
class Coordinator:
    """One federation; see the module for what it does not do."""

    settings: Federation
    restored: Restored
    dropped: int = 0
    """Messages that were malformed, foreign or too large, and were dropped."""
    phase: Phase = field(init=False, default="waiting")
    _topics: Topics = field(init=False)
    _roster: Roster = field(init=False)
    _uploads: Uploads = field(init=False)
    _progress: Progress = field(init=False)
    _open: OpenTask | None = field(init=False, default=None)
    _task: int = field(init=False)
    _version: int = field(init=False)
    _digest: bytes = field(init=False)
    _digests: dict[int, bytes] = field(init=False, default_factory=dict)
    _round: int = field(init=False)
    _began: float | None = field(init=False, default=None)
    _counted: tuple[int, int] = field(init=False, default=(0, 0))
    _result: Round | None = field(init=False, default=None)
    _retry: float = field(init=False, default=0.0)
    _gather: float | None = field(init=False, default=None)
    _connected: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        restored, transfer_ = self.restored, self.settings.transfer
        self._topics = Topics(self.settings.federation.name)
        self._roster = Roster(counting=not restored.rounds)
        self._uploads = Uploads(transfer_.uploads, transfer_.window, restored.update_limit)
        # A round whose evaluation goes on has its result in the ledger already, and is counted when it is finished.
        resumed = restored.open_task
        under_way = resumed.round if resumed is not None else None
        finished = [result for result in restored.rounds if result.round != under_way]
        self._progress = Progress(self.settings.stop, finished, restored.started)
        self._task = restored.last_task
        self._version, self._digest = restored.version, restored.digest
        self._digests[restored.version] = restored.digest
        self._round = (restored.rounds[-1].round if restored.rounds else 0) + 1
        if resumed is not None:
            self.phase = resumed.kind
            self._begin(resumed)
            self._result = next((r for r in restored.rounds if r.round == resumed.round), None)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""
        times = [self._uploads.wake]
        if self._open is not None and self._open.opened and not self._open.count("recording"):
            times.append(self._open.deadline)
        if self.phase == "waiting" and self._connected:
            times += [time for time in (self._retry, self._gather) if time]
        return min((time for time in times if time is not None), default=None)

    @property
    def clients(self) -> int:
        """Clients that are there and may train."""
        return self._roster.present()

    def handle(self, event: e.Event, now: float) -> list[e.Action]:
        """Take one event at monotonic time ``now`` (seconds); return what to do, in order."""
        return list(self._handle(event, now))

    def _handle(self, event: e.Event, now: float) -> Iterator[e.Action]:
        match event:
            case e.Connected():
                self._connected = True
                yield from self._start(now)
            case e.Disconnected():
                self._connected = False
            case e.Received(topic, payload):
                yield from self._received(topic, payload, now)
            case e.Opened(epoch, task):
                yield from self._opened(epoch, task, now)
            case e.Recorded():
                yield from self._recorded(event, now)
            case e.Refused(epoch, task, client, reason):
                if self._is_open(epoch, task, client):
                    self._member(client, "gone")
                yield self._tell(client, m.Receipt(epoch, task, "refused", reason[:500]))
                yield e.Log(f"refused an update of {client}: {reason}")
                yield from self._refill(now)
            case e.Answered(epoch, task, client, status):
                yield self._tell(client, m.Receipt(epoch, task, status))
            case e.Prepared():
                yield from self._prepared(event)
            case e.Aggregated(version, digest):
                yield from self._aggregated(version, digest, now)
            case e.Evaluated(version, metrics):
                if self.phase == "measure" and version == self._version and self._result is not None:
                    self._result.metrics.update(metrics)
                    yield from self._ask_clients(now)
            case e.Tick():
                yield from self._tick(now)

    # The start of an epoch.

    def _start(self, now: float) -> Iterator[e.Action]:
        yield e.Subscribe((self._topics.every_up,))
        if self.restored.bundle.inline is None:
            yield e.Spread(self.restored.bundle)
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
        if self._gather is None:
            self._gather = now + self.settings.transfer.spread + _GATHER if self.restored.rounds else 0.0
        task, resumed = self._open, self.restored.open_task
        if task is not None:
            for delta in task.blobs():
                yield e.Spread(delta)
            if task.opened:
                yield from self._remind(task)
            elif resumed is not None and task.identity == (resumed.epoch, resumed.task):
                yield from self._opened(*task.identity, now)
        yield from self._consider(now)

    def _remind(self, task: OpenTask) -> Iterator[e.Action]:
        """Invite again: what was said while the connection was gone is lost."""
        for client, state in task.members.items():
            member = self._roster.get(client)
            if member is not None and state == "asked" and client in task.invited:
                yield from self._invite(client, member)

    def _offer(self) -> m.Offer:
        return m.Offer(
            self.settings.federation.name,
            self.restored.epoch,
            self.restored.bundle,
            self.settings.transfer.spread,
            finished=self.phase == "stopped",
        )

    # What clients say.

    def _received(self, topic: str, payload: bytes, now: float) -> Iterator[e.Action]:
        try:
            client, chunk = self._topics.parse_up(topic)
            if chunk is None:
                yield from self._said(client, m.decode(payload), now)
                return
            data, grants = self._uploads.chunk(client, chunk.sha256, chunk.index, payload, now)
            yield from self._credit(grants)
            if data is not None:
                yield from self._take(client, data)
        except WireError as error:
            self.dropped += 1
            if self.dropped == 1:
                yield e.Log(f"dropped a message on {_printable(topic[:100])}: {error} (further ones are only counted)")

    def _said(self, client: str, message: m.Message, now: float) -> Iterator[e.Action]:
        match message:
            case m.Hello():
                yield from self._greeted(client, message, now)
            case m.Goodbye(boot):
                if self._roster.goodbye(client, boot):
                    yield from self._credit(self._uploads.forget(client, now))
                    yield from self._lost(client, now)
            case m.Decline(epoch, task, reason):
                if self._is_open(epoch, task, client):
                    yield e.Log(f"{client} declines task {task}: {_printable(reason)}")
                    yield from self._lost(client, now)
            case m.Upload():
                self._roster.count(client, message.traffic)
                yield from self._announced(client, message, now)
            case m.Missing(sha256, indices):
                known = [self.restored.bundle, *(self._open.blobs() if self._open is not None else ())]
                for ref in known:
                    if ref.sha256 == sha256 and ref.inline is None:
                        yield e.Spread(ref, tuple(index for index in indices if index < transfer.count(ref)))
            case _:
                raise WireError(f"{type(message).__name__} is not for the server")

    def _greeted(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        if hello.epoch != self.restored.epoch or hello.bundle != self.restored.bundle.sha256:
            return
        member = self._roster.hello(client, hello)
        task = self._open
        answered = ("recording", "recorded")
        if (
            task is not None
            and task.opened
            and hello.available
            and task.members.get(client, "recorded") not in answered
        ):
            self._member(client, "asked")
            yield from self._invite(client, member)
        yield from self._consider(now)
        yield from self._refill(now)

    def _announced(self, client: str, upload: m.Upload, now: float) -> Iterator[e.Action]:
        if not self._is_open(upload.epoch, upload.task, client):
            yield e.Inquire(upload.epoch, upload.task, client)
            return
        assert self._open is not None
        state = self._open.members[client]
        if state == "recorded":
            yield self._tell(client, m.Receipt(upload.epoch, upload.task, "recorded"))
        elif state != "recording":
            self._member(client, "asked")
            try:
                data = transfer.unwrap(upload.blob)
                grants = self._uploads.announce(client, upload.blob, now) if data is None else []
            except WireError as error:
                yield from self._handle(e.Refused(upload.epoch, upload.task, client, str(error)), now)
                return
            yield from self._credit(grants)
            if data is not None:
                yield from self._take(client, data)

    def _take(self, client: str, data: bytes) -> Iterator[e.Action]:
        if self._open is not None and client in self._open.members:
            self._member(client, "recording")
            yield e.Record(*self._open.identity, client, data)

    # A task, from opening to close.

    def _consider(self, now: float) -> Iterator[e.Action]:
        """Open a round when there is none and there are clients enough."""
        if self.phase != "waiting" or not self._connected or now < self._retry:
            return
        reason = self._progress.reason()
        if reason is not None:
            yield from self._stop(reason)
            return
        rounds = self.settings.round
        quorum = rounds.quorum if not self._progress.rounds or self._gather else rounds.minimum
        if self._roster.present() < max(1, quorum):
            return
        if self._began is None:
            self._began = now
        yield from self._open_task("train", rounds.invited, now)

    def _open_task(self, kind: Literal["train", "evaluate"], count: int, now: float) -> Iterator[e.Action]:
        self._task += 1
        self.phase = kind
        rng = random.Random(f"{self.settings.federation.seed}/{self._round}/{self._task}")  # noqa: S311
        cohort = tuple(select(self._roster.candidates(), count, rng))
        task = Task(
            epoch=self.restored.epoch,
            task=self._task,
            round=self._round,
            kind=kind,
            version=self._version,
            cohort=cohort,
            plan=b"",
            opened=now,
        )
        self._begin(task)
        yield e.OpenTask(task)

    def _begin(self, task: Task) -> None:
        train = task.kind == "train"
        goal = min(self.settings.round.cohort if train else self.settings.evaluation.clients, len(task.cohort))
        self._round = task.round
        self._open = OpenTask(task, goal, math.inf, members=dict.fromkeys(task.cohort, "asked"))

    def _opened(self, epoch: int, task: int, now: float) -> Iterator[e.Action]:
        if self._open is None or self._open.identity != (epoch, task):
            return
        if not self._open.opened:
            train = self._open.task.kind == "train"
            seconds = self.settings.round.deadline if train else self.settings.evaluation.deadline
            self._open.opened, self._open.deadline = True, now + seconds
            if self._began is None:
                self._began = now
        for client, state in self._open.members.items():
            member = self._roster.get(client)
            if member is not None and state == "asked" and client not in self._open.invited:
                yield from self._invite(client, member)
        yield from self._refill(now)

    def _invite(self, client: str, member: Member) -> Iterator[e.Action]:
        """Invite now where the delta is there, else once it is built."""
        assert self._open is not None
        self._open.invited.add(client)
        member.last_round = self._round
        version = self._open.task.version
        held = member.version if self._digests.get(member.version) == member.digest else 0
        if self.settings.codec.kind == "none" and held != version:
            held = 0  # a full snapshot leads from anywhere, so one blob serves all
        if held == version or held in self._open.deltas:
            yield self._invitation(client, held)
            return
        waiting = self._open.waiting.setdefault(held, [])
        if not waiting:
            yield e.Prepare(held, version)
        if client not in waiting:
            waiting.append(client)

    def _prepared(self, event: e.Prepared) -> Iterator[e.Action]:
        if self._open is None or self._open.task.version != event.version:
            if event.ref.inline is None:
                yield e.Sweep(event.ref)
            return
        self._open.deltas[event.held] = event.ref
        if event.ref.inline is None:
            yield e.Spread(event.ref)
        for client in self._open.waiting.pop(event.held, []):
            yield self._invitation(client, event.held)

    def _invitation(self, client: str, held: int) -> e.Action:
        assert self._open is not None
        task, train, codec = self._open.task, self.settings.train, self.settings.codec
        return self._tell(
            client,
            m.Invitation(
                *self._open.identity,
                task.round,
                task.kind,
                m.TrainPlan(train.epochs, train.steps, train.batch_size, train.hypers),
                m.UpdatePlan(codec.kind, codec.step, codec.dead_zone, codec.feedback),
                self.settings.federation.seed,
                self.settings.round.deadline if task.kind == "train" else self.settings.evaluation.deadline,
                held,
                task.version,
                self._digest,
                self._open.deltas.get(held),
            ),
        )

    def _recorded(self, event: e.Recorded, now: float) -> Iterator[e.Action]:
        yield self._tell(event.client, m.Receipt(event.epoch, event.task, "recorded"))
        if not self._is_open(event.epoch, event.task, event.client):
            return
        assert self._open is not None
        self._member(event.client, "recorded")
        self._open.samples += event.samples
        for name, value in event.scalars.items():
            self._open.sums[name] = self._open.sums.get(name, 0.0) + value
        member = self._roster.get(event.client)
        if member is not None:
            member.version, member.digest = self._open.task.version, self._digest
        yield from self._refill(now)

    def _lost(self, client: str, now: float) -> Iterator[e.Action]:
        if self._open is not None and self._open.members.get(client) == "asked":
            self._member(client, "gone")
            yield from self._refill(now)

    def _refill(self, now: float) -> Iterator[e.Action]:
        """Close the task when it has what it wants; ask others where members are lost."""
        task = self._open
        if task is None or not task.opened:
            return
        recorded, under_way = task.count("recorded"), task.count("asked", "recording")
        if recorded >= task.goal:
            yield from self._close(now)
            return
        if recorded + under_way >= task.goal:
            return
        rng = random.Random(f"{self.settings.federation.seed}/{self._round}/{self._task}/{len(task.members)}")  # noqa: S311
        more = select(self._roster.candidates(task.members), task.goal - recorded - under_way, rng)
        if more:
            task.members.update(dict.fromkeys(more, "asked"))
            yield e.Enlarge(*task.identity, tuple(more))
        elif not under_way and recorded >= self._fewest():
            yield from self._close(now)

    def _fewest(self) -> int:
        """Results without which a task is void; an evaluation makes do with any."""
        assert self._open is not None
        return self.settings.round.minimum if self._open.task.kind == "train" else 0

    def _close(self, now: float) -> Iterator[e.Action]:
        task = self._open
        assert task is not None
        if task.count("recording"):
            return
        yield from self._put_away(task)
        if task.task.kind == "train":
            self.phase = "aggregate"
            self._result = self._train_result(task)
            # What the ledger may forget is forgotten here too: a client that comes back with it starts from version 0.
            keep = self._roster.versions()
            self._digests = {held: known for held, known in self._digests.items() if held in keep}
            yield e.Aggregate(*task.identity, self._result, keep)
        else:
            yield e.CloseTask(*task.identity, "done")
            if self._result is not None:
                measured = task.metrics("client_")
                self._result.metrics.update(measured)
                for name, value in measured.items():
                    self._result.metrics.setdefault(name.removeprefix("client_"), value)
            yield from self._finish(now)

    def _void(self, now: float) -> Iterator[e.Action]:
        task = self._open
        assert task is not None
        yield e.Log(
            f"round {self._round}: {task.count('recorded')} of {self._fewest()} updates came in time; asking again"
        )
        yield from self._put_away(task)
        yield e.CloseTask(*task.identity, "void")
        for client, state in task.members.items():
            if state == "recorded":
                yield self._tell(client, m.Receipt(*task.identity, "void"))
        self.phase, self._retry = "waiting", now + _RETRY

    def _put_away(self, task: OpenTask) -> Iterator[e.Action]:
        self._open = None
        self._uploads.clear()
        for delta in task.blobs():
            yield e.Sweep(delta)

    # After the updates are in.

    def _train_result(self, task: OpenTask) -> Round:
        return Round(
            round=self._round,
            version=self._version + 1,
            clients=task.count("recorded"),
            samples=task.samples,
            seconds=0.0,
            bytes_up=0,
            bytes_down=0,
            metrics=task.metrics("train_"),
        )

    def _aggregated(self, version: int, digest: bytes, now: float) -> Iterator[e.Action]:
        if self.phase != "aggregate":
            return
        self._version, self._digest = version, digest
        self._digests[version] = digest
        every = self.settings.evaluation.every
        if not every or self._round % every:
            yield from self._finish(now)
            return
        self.phase = "measure"
        if self.settings.evaluation.data:
            yield e.Evaluate(version)
        else:
            yield from self._ask_clients(now)

    def _ask_clients(self, now: float) -> Iterator[e.Action]:
        wanted = self.settings.evaluation.clients
        if wanted and self._roster.present():
            yield from self._open_task("evaluate", wanted, now)
        else:
            yield from self._finish(now)

    def _finish(self, now: float) -> Iterator[e.Action]:
        up, down = self._roster.up, self._roster.down
        seconds = now - self._began if self._began is not None else 0.0
        if self._result is not None:
            result = Round(
                round=self._result.round,
                version=self._result.version,
                clients=self._result.clients,
                samples=self._result.samples,
                seconds=seconds,
                bytes_up=up - self._counted[0],
                bytes_down=down - self._counted[1],
                metrics=self._result.metrics,
            )
            yield e.FinishRound(result, self._progress.add(result))
        self._counted, self._began, self._result = (up, down), now, None
        self._round += 1
        self.phase, self._retry = "waiting", 0.0
        yield from self._consider(now)

    def _stop(self, reason: str) -> Iterator[e.Action]:
        self.phase = "stopped"
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
        yield e.Stop(reason)

    def _tick(self, now: float) -> Iterator[e.Action]:
        yield from self._credit(self._uploads.tick(now))
        if now >= self._retry:
            self._retry = 0.0
        if self._gather is not None and now >= self._gather:
            self._gather = 0.0
        task = self._open
        if task is not None and task.opened and now >= task.deadline and not task.count("recording"):
            if task.count("recorded") >= self._fewest():
                yield from self._close(now)
            else:
                yield from self._void(now)
        yield from self._consider(now)

    # Small things.

    def _is_open(self, epoch: int, task: int, client: str) -> bool:
        return self._open is not None and self._open.identity == (epoch, task) and client in self._open.members

    def _member(self, client: str, state: State) -> None:
        assert self._open is not None
        self._open.members[client] = state

    def _credit(self, grants: list[Grant]) -> Iterator[e.Action]:
        for grant in grants:
            yield self._tell(grant.client, m.Credit(grant.sha256, grant.indices))

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(self._topics.down(client), m.encode(message))


def _printable(text: str) -> str:
    """What a stranger says, fit for an operator's terminal: on one line and without escape sequences."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
