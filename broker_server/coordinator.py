"""The federation's state machine, round after round: events in, actions out. The life of one task is in ``tasks``.

It does no I/O, reads no clock and draws its randomness from the federation's seed. It holds ids, never tensors:
decoding, aggregating, evaluating and writing to the ledger are actions, done by a worker, whose results come back as
events.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.config import Federation
from broker_server.ledger import Task
from broker_server.roster import Roster
from broker_server.rounds import OpenRound
from broker_server.selection import select
from broker_server.stopping import Progress
from broker_server.tasks import OpenTask
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics

Phase = Literal["waiting", "train", "aggregate", "measure", "gather", "evaluate", "stopped"]
_RETRY = 5.0
"""Seconds between a void round and the next attempt at it."""
_MEMORY = 32
"""Versions for which one is kept that only clients hold who are away; later the whole difference is hardly larger."""
HEARTBEAT = 300.0
"""Seconds between hellos of an idle client, give or take a quarter."""
_MISSED = 3.0
"""Heartbeats without a word after which a client is taken for dead: its last will may be lost."""
_GREETINGS = 200
"""Hellos a second that a fleet may answer an offer with."""
_GATHER = 10.0
"""Seconds, beside the spread, in which a fleet may come back after a restart; then a round begins with who is there."""


@dataclass
class Coordinator:
    """One federation; see the module for what it does not do."""

    settings: Federation
    restored: e.Restored
    dropped: int = 0
    """Messages that were malformed, foreign or too large, and were dropped."""
    phase: Phase = field(init=False, default="waiting")
    _topics: Topics = field(init=False)
    _roster: Roster = field(init=False)
    _progress: Progress = field(init=False)
    _open: OpenTask | None = field(init=False, default=None)
    _void: dict[tuple[int, int], OpenTask] = field(init=False, default_factory=dict)
    """Tasks that are void, and not yet so in the ledger."""
    _task: int = field(init=False)
    _version: int = field(init=False)
    _digests: dict[int, bytes] = field(init=False, default_factory=dict)
    _round: OpenRound = field(init=False)
    _retry: float = field(init=False, default=0.0)
    _gather: float | None = field(init=False, default=None)
    _connected: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        restored = self.restored
        self._topics = Topics(self.settings.federation.name)
        self._roster = Roster(counting=not restored.rounds, silence=_MISSED * HEARTBEAT)
        # A round whose evaluation goes on has its result in the ledger already, and is counted when it is finished.
        finished = [result for result in restored.rounds if result.round != restored.unfinished]
        self._progress = Progress(self.settings.stop, finished)
        self._task, self._version = restored.last_task, restored.version
        self._digests[restored.version] = restored.digest
        self._round = OpenRound((finished[-1].round if finished else 0) + 1)
        for result in restored.rounds:
            if result.round == restored.unfinished:
                self.phase, self._round = "measure", OpenRound(result.round, result=result)
        if restored.open_task is not None:
            self.phase, self._open = restored.open_task.kind, self._begin(restored.open_task)
            self._open.resume(restored.uploads)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""
        times = [self._open.wake] if self._open is not None else []
        if self.phase != "stopped":
            times.append(self._roster.wake)
        if self.phase in ("waiting", "gather") and self._connected:
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
                if self._open is not None and self._open.identity == (epoch, task):
                    yield from self._opened(self._open, now)
            case e.Recorded(epoch, task, client):
                yield self._tell(client, m.Receipt(epoch, task, "recorded"))
                member = self._roster.get(client)
                if open_ := self._task_of(epoch, task, client):
                    open_.recorded(event)
                    if member is not None:
                        member.void = None
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
            case e.Answered(epoch, task, client, status):
                yield self._tell(client, m.Receipt(epoch, task, status))
            case e.Prepared(held, version, ref):
                if self._open is not None and self._open.task.version == version:
                    yield from self._open.prepared(held, ref)
                elif ref.inline is None:
                    yield e.Sweep(ref)
            case e.Aggregated(version, digest, clipped):
                if self.phase == "aggregate":
                    self._version, self._digests[version] = version, digest
                    if clipped:
                        yield e.Log(_diverged(version, clipped))
                    yield from self._measure(now)
            case e.Closed(epoch, task):
                if void := self._void.pop((epoch, task), None):
                    self._roster.void(void.contributors, void.identity)
                    yield from void.voided()
            case e.Evaluated(version, metrics):
                if self.phase == "measure" and version == self._version:
                    self._round.measured(metrics)
                    yield from self._ask_clients(now)
            case e.Tick():
                yield from self._tick(now)

    # The start of an epoch.

    def _start(self, now: float) -> Iterator[e.Action]:
        first = self._gather is None
        if first:
            self._gather = now + self._spread + _GATHER if self.restored.rounds else 0.0
            if self.restored.leftovers:
                yield e.Clear(self.restored.leftovers)
        yield e.Subscribe((self._topics.every_up, self._topics.offer))
        if self.restored.bundle.inline is None:
            yield e.Spread(self.restored.bundle)
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
        task = self._open
        if task is not None:
            for delta in task.blobs():
                yield e.Spread(delta)
            # What was said while the connection was gone is lost.
            yield from self._invite(task, task.unanswered())
        if first:
            yield from self._resume(now)
        yield from self._consider(now)

    def _resume(self, now: float) -> Iterator[e.Action]:
        """Go on with what the ledger says was under way."""
        if self._round.result is not None and (self._open is None or self.settings.evaluation.data):
            # What was measured before is lost; clients that evaluate go on once it is measured again.
            self._round.begin(now)
            yield from self._measure(now)
        elif self._open is not None:
            yield from self._opened(self._open, now)

    @property
    def _spread(self) -> float:
        """Seconds over which clients answer the offer: a large fleet takes longer than was configured."""
        fleet = max(self.restored.fleet, self._roster.present())
        return max(self.settings.transfer.spread, float(fleet // _GREETINGS))

    def _offer(self) -> m.Offer:
        return m.Offer(
            self.settings.federation.name,
            self.restored.epoch,
            self.restored.bundle,
            self._spread,
            HEARTBEAT,
            finished=self.phase == "stopped",
        )

    # What clients say.

    def _received(self, topic: str, payload: bytes, now: float) -> Iterator[e.Action]:
        try:
            if topic == self._topics.offer:
                yield from self._offered(m.decode(payload))
                return
            client, chunk = self._topics.parse_up(topic)
            if chunk is None:
                yield from self._said(client, m.decode(payload), now)
            elif self._open is None:
                raise WireError(f"chunk of an upload by {client} that is not under way")
            else:
                yield from self._open.chunk(client, chunk.sha256, chunk.index, payload, now)
            self._roster.hear(client, now)
        except WireError as error:
            self.dropped += 1
            if self.dropped == 1:
                yield e.Log(f"dropped a message on {_printable(topic[:100])}: {error} (further ones are only counted)")

    def _offered(self, offer: m.Message) -> Iterator[e.Action]:
        """An offer is retained: this server's own, one of an older server, or of a newer one that takes over."""
        if not isinstance(offer, m.Offer):
            raise WireError(f"{type(offer).__name__} is no offer")
        if offer.epoch > self.restored.epoch:
            yield e.Fenced(offer.epoch)
        elif offer.epoch < self.restored.epoch:
            yield e.Retain(self._topics.offer, m.encode(self._offer()))

    def _said(self, client: str, message: m.Message, now: float) -> Iterator[e.Action]:
        match message:
            case m.Hello():
                yield from self._greeted(client, message, now)
            case m.Goodbye(boot):
                if self._roster.goodbye(client, boot) and self._open is not None:
                    yield from self._open.leave(client, now)
                    yield from self._go_on(now)
            case m.Decline(epoch, number, reason):
                if task := self._task_of(epoch, number, client):
                    yield e.Log(f"{client} declines task {number}: {_printable(reason)}")
                    task.lose(client)
                    yield from self._go_on(now)
            case m.Upload(epoch, number, blob, traffic):
                self._roster.count(client, traffic)
                if task := self._task_of(epoch, number, client):
                    yield from task.announce(client, blob, now)
                    yield from self._go_on(now)
                elif epoch <= self.restored.epoch:
                    # Of an epoch to come this ledger knows nothing: a newer server does, and will say.
                    yield e.Inquire(epoch, number, client)
            case m.Missing(sha256, indices):
                known = [self.restored.bundle, *(self._open.blobs() if self._open is not None else ())]
                for ref in known:
                    if ref.sha256 == sha256 and ref.inline is None:
                        yield e.Spread(ref, tuple(index for index in indices if index < transfer.count(ref)))
            case _:
                raise WireError(f"{type(message).__name__} is not for the server")

    def _greeted(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        if hello.epoch < self.restored.epoch:
            # It has missed this epoch's offer.
            yield self._tell(client, self._offer())
        if hello.epoch != self.restored.epoch or hello.bundle != self.restored.bundle.sha256:
            return
        self._roster.hello(client, hello)
        if self._open is not None and self._open.greet(client, available=hello.available):
            yield from self._invite(self._open, [client])
        yield from self._consider(now)
        yield from self._go_on(now)

    # Tasks.

    def _begin(self, task: Task) -> OpenTask:
        spares = {candidate.id for candidate in self._roster.candidates() if candidate.available}
        return OpenTask(task, self.settings, dict(self._digests), self.restored.update_limit, spares - {*task.cohort})

    def _open_task(self, kind: Literal["train", "evaluate"], count: int) -> Iterator[e.Action]:
        self._task += 1
        self.phase = kind
        rng = random.Random(f"{self.settings.federation.seed}/{self._round.number}/{self._task}")  # noqa: S311
        task = Task(
            epoch=self.restored.epoch,
            task=self._task,
            round=self._round.number,
            kind=kind,
            version=self._version,
            cohort=tuple(select(self._roster.candidates(), count, rng)),
            plan=b"",
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
                if member.void is not None:
                    # Said before, to a client that may have been away: its residual hangs on it.
                    yield self._tell(client, m.Receipt(*member.void, "void"))
                yield from task.invite(client, member.version, member.digest, member.uplink)

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
        self.phase = "aggregate"
        result = self._round.trained(task, self._version + 1)
        # What the ledger may forget is forgotten here too: a client that comes back with it starts from version 0.
        keep = self._roster.versions(recent=self._version - _MEMORY)
        self._digests = {held: known for held, known in self._digests.items() if held in keep}
        yield e.Aggregate(*task.identity, result, keep)

    def _tested(self, task: OpenTask, now: float) -> Iterator[e.Action]:
        yield e.CloseTask(*task.identity, "done")
        self._round.tested(task)
        yield from self._finish(now)

    # Rounds.

    def _consider(self, now: float) -> Iterator[e.Action]:
        """Go on with the round, or open the next one, when there are clients enough."""
        if not self._connected or now < self._retry:
            return
        if self.phase == "gather":
            yield from self._ask_clients(now)
            return
        if self.phase != "waiting":
            return
        reason = self._progress.reason()
        if reason is not None:
            yield from self._stop(reason)
            return
        rounds = self.settings.round
        quorum = rounds.quorum if not self._progress.rounds or self._gather else rounds.minimum
        if self._roster.present() < max(1, quorum):
            return
        self._round.begin(now)
        yield from self._open_task("train", rounds.invited)

    def _measure(self, now: float) -> Iterator[e.Action]:
        every = self.settings.evaluation.every
        if self._open is None and (not every or self._round.number % every):
            yield from self._finish(now)
            return
        self.phase = "measure"
        if self.settings.evaluation.data:
            yield e.Evaluate(self._version)
        else:
            yield from self._ask_clients(now)

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
        result = self._round.finished(self._roster.up, self._roster.down, now)
        if result is not None:
            yield e.FinishRound(result, self._progress.add(result), self._roster.present())
        self._round = OpenRound(self._round.number + 1, now, self._roster.up, self._roster.down)
        self.phase, self._retry = "waiting", 0.0
        yield from self._consider(now)

    def _stop(self, reason: str) -> Iterator[e.Action]:
        self.phase = "stopped"
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
        yield e.Stop(reason)

    def _tick(self, now: float) -> Iterator[e.Action]:
        if now >= self._retry:
            self._retry = 0.0
        if self._gather is not None and now >= self._gather:
            self._gather = 0.0
        for client in self._roster.lapse(now):
            if self._open is not None:
                yield from self._open.leave(client, now)
        if self._open is not None:
            yield from self._open.tick(now)
        yield from self._go_on(now)
        yield from self._consider(now)

    # Small things.

    def _task_of(self, epoch: int, task: int, client: str) -> OpenTask | None:
        """The open task, where it is this one and the client is a member."""
        open_ = self._open
        return open_ if open_ is not None and open_.identity == (epoch, task) and client in open_ else None

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(self._topics.down(client), m.encode(message))


def _diverged(version: int, clipped: int) -> str:
    return (
        f"version {version}: {clipped} parameters are out of the lattice's reach and stay at its edge: "
        "training diverges; a lower learning rate may help"
    )


def _printable(text: str) -> str:
    """What a stranger says, fit for an operator's terminal: on one line and without escape sequences."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
