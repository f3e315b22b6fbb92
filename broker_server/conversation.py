"""What the server of every federation does, whatever its rounds: the offer, who is there, what clients say, versions.

It does no I/O, reads no clock and draws its randomness from the federation's seed. It holds ids, never tensors:
decoding, aggregating, evaluating and writing to the ledger are actions, done by a worker, whose results come back as
events.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from broker_server import events as e
from broker_server.hearing import HEARTBEAT, Hearing
from broker_server.records import Round
from broker_server.repetition import Repetition
from broker_server.rounds import OpenRound
from broker_server.stopping import Progress
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire.transfer import WINDOW

Phase = Literal["waiting", "train", "aggregate", "measure", "gather", "evaluate", "stopped"]
_MEMORY = 32
"""Versions for which one is kept that only clients hold who are away; later the whole difference is hardly larger."""
_GREETINGS = 200
"""Hellos a second that a fleet may answer an offer with."""
_GATHER = 10.0
"""Seconds, beside the spread, in which a fleet may come back after a restart; then it goes on with who is there."""
_CLOCK_ERROR = 3600.0
"""Seconds that a clock may be behind the date of an earlier offer and be taken for right."""
_RENEWED = 0.25
"""Share of the time that an offer holds after which it is dated anew."""
_DEFENCE = 1.0
"""Seconds between two times that the offer is put back."""


@dataclass
class Conversation(Hearing):
    """One federation's side of everything that is said; tasks, and what is asked of whom, are left to its kinds."""

    phase: Phase = field(init=False, default="waiting")
    _progress: Progress = field(init=False)
    _task: int = field(init=False)
    _version: int = field(init=False)
    _pace: float = field(init=False)
    """How far an element of the model moves in a round."""
    _digests: dict[int, bytes] = field(init=False, default_factory=dict)
    _round: OpenRound = field(init=False)
    _gather: float | None = field(init=False, default=None)
    _connected: bool = field(init=False, default=False)
    _wall: float = field(init=False, default=0.0)
    """What the clock shows, seconds since 1970; 0 where nothing is dated."""
    _said: tuple[m.Offer, bytes] | None = field(init=False, default=None)
    """The offer as it stands, and as it is retained."""
    _again: float | None = field(init=False, default=None)
    """When it is put back in its place once more."""
    _steering: e.Steered = field(init=False, default_factory=e.Steered)
    _repetition: Repetition = field(init=False)
    _defended: float = field(init=False, default=-math.inf)
    """When it was put back last where somebody else had put another one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        restored = self.restored
        self._repetition = Repetition(WINDOW)
        # A round whose evaluation goes on has its result in the ledger already, and is counted when it is finished.
        finished = [result for result in restored.rounds if result.round != restored.unfinished]
        self._progress = Progress(self.settings.stop, finished)
        self._task, self._version, self._pace = restored.last_task, restored.version, restored.pace
        self._digests |= restored.digests
        self._digests[restored.version] = restored.digest
        self._round = OpenRound((finished[-1].round if finished else 0) + 1)
        for result in restored.rounds:
            if result.round == restored.unfinished:
                self.phase, self._round = "measure", OpenRound(result.round, result=result)

    # What its kinds do.

    @property
    @abstractmethod
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""

    @abstractmethod
    def _answered(self, event: e.Event, now: float) -> Iterator[e.Action]:
        """The worker has done something about a task."""

    @abstractmethod
    def _repeat(self) -> Iterator[e.Action]:
        """There is a connection again: what was said and retained while there was none is lost."""

    @abstractmethod
    def _resume(self, now: float) -> Iterator[e.Action]:
        """Go on with what the ledger says was under way."""

    @abstractmethod
    def _consider(self, now: float) -> Iterator[e.Action]:
        """Begin what can begin, when there are clients enough."""

    @abstractmethod
    def _ask_clients(self, now: float) -> Iterator[e.Action]:
        """The server has measured the newest version: have clients evaluate it, where they are to."""

    @abstractmethod
    def _uploads(self, client: str, upload: m.Upload, now: float) -> Iterator[e.Action]:
        """A client has an update."""

    @abstractmethod
    def _declines(self, client: str, decline: m.Decline, now: float) -> Iterator[e.Action]:
        """A client cannot do a task."""

    @abstractmethod
    def _comes(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        """A client is there; the roster knows it."""

    @abstractmethod
    def _blobs(self) -> list[m.BlobRef]:
        """Deltas that are retained on the broker."""

    @abstractmethod
    def _tick(self, now: float) -> Iterator[e.Action]:
        """Time has passed."""

    # Events.

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
            case e.Clock(wall):
                self._wall = wall
                if self._connected and self._misdated:
                    yield from self._proclaim()
            case e.Rekeyed(given, gone):
                yield from self._rekeyed(given, gone, now)
            case e.Steered():
                yield from self._steered(event, now)
            case e.Say(client, message):
                yield self._tell(client, message)
            case e.Refused(_, _, client, reason):
                yield from self._answered(event, now)
                yield from self._struck(self._conduct.strike(client, reason, now), now)
            case e.Damaged(_, _, client):
                yield from self._answered(event, now)
                yield from self._struck(self._conduct.damaged(client, now), now)
            case e.Aggregated(version, digest, clipped, pace):
                if self.phase == "aggregate":
                    self._version, self._digests[version], self._pace = version, digest, pace
                    if clipped:
                        yield e.Log(_diverged(version, clipped))
                    yield from self._measure(now)
            case e.Evaluated(version, metrics):
                if self.phase == "measure" and version == self._version:
                    self._round.measured(metrics)
                    yield from self._ask_clients(now)
            case e.Tick():
                if self._gather is not None and now >= self._gather:
                    self._gather = 0.0
                for client in self._roster.lapse(now):
                    yield from self._leaves(client, now)
                if self._again is not None and self._connected and now >= self._again:
                    yield from self._proclaim()
                yield from self._tick(now)
            case _:
                yield from self._answered(event, now)

    # The start of an epoch.

    def _start(self, now: float) -> Iterator[e.Action]:
        first = self._gather is None
        if first:
            self._gather = now + self._spread + _GATHER if self.restored.rounds else 0.0
            if self.restored.leftovers:
                yield e.Clear(self.restored.leftovers)
        self._repetition.forget()
        yield e.Subscribe((self._topics.every_up, self._topics.offer))
        if self.restored.bundle.inline is None:
            yield e.Spread(self.restored.bundle)
        for ref, _ in self._steering.files:
            yield e.Spread(ref)
        yield from self._proclaim()
        yield from self._repeat()
        if first:
            yield from self._resume(now)
        yield from self._consider(now)

    @property
    def _spread(self) -> float:
        """Seconds over which clients answer the offer: a large fleet takes longer than was configured."""
        fleet = max(self.restored.fleet, self._roster.present())
        return max(self.settings.transfer.spread, float(fleet // _GREETINGS))

    @property
    def _silence(self) -> float | None:
        """When clients may have been silent for too long, or the offer is to be put back."""
        times = (self._roster.wake, self._again if self._connected else None)
        return None if self.phase == "stopped" else min((time for time in times if time is not None), default=None)

    @property
    def _misdated(self) -> bool:
        """Whether the offer's date is not that of the clock any more: time has passed, or the clock was set."""
        return self._said is not None and self._date - self._said[0].issued > _RENEWED * self._holds

    @property
    def _holds(self) -> float:
        """Seconds that an offer holds."""
        return self.settings.trust.offer_days * 86_400

    @property
    def _date(self) -> float:
        """What an offer is dated with: devices remember the newest date, and take what is far before it for expired.

        So a clock that was wrong by years and is set right does not lock a fleet out.
        """
        before = self.restored.issued if self._said is None else self._said[0].issued
        return max(self._wall, before) if self._wall else 0.0

    def _proclaim(self) -> Iterator[e.Action]:
        """Retain the offer as it stands; with a date, where the federation signs what it says."""
        self._again = None
        date = self._date
        offer = m.Offer(
            self.settings.federation.name,
            self.restored.epoch,
            self.restored.bundle,
            self._spread,
            HEARTBEAT,
            finished=self.phase == "stopped",
            issued=date,
            expires=date + self._holds if date else 0.0,
        )
        self._said = offer, self.voice.proclaim(offer)
        if date:
            yield e.Dated(date)
        if date > self._wall + _CLOCK_ERROR:
            ahead = date - self._wall
            yield e.Log(
                f"the clock is {ahead:.0f} s behind the date of an earlier offer, which offers keep: is it right?"
            )
        yield e.Retain(self._topics.offer, self._said[1])

    # What clients say.

    def _offered(self, payload: bytes, now: float) -> Iterator[e.Action]:
        """An offer is retained: this server's own, one of an older server, or of a newer one that takes over."""
        try:
            offer, stamp = self.voice.overhear(payload)
            if not isinstance(offer, m.Offer):
                raise WireError(f"{type(offer).__name__} is no offer")
        except WireError as error:
            yield from self._drop(self._topics.offer, error)
            yield from self._defend(now)
            return
        if offer.epoch > self.restored.epoch:
            yield e.Fenced(offer.epoch)
        elif offer.epoch < self.restored.epoch or (stamp.count and self._said is not None and offer != self._said[0]):
            yield from self._defend(now)

    def _defend(self, now: float) -> Iterator[e.Action]:
        """Put the offer back in its place, at once the first time and soon where that is needed again and again."""
        if self._said is None:
            return
        if now - self._defended >= _DEFENCE:
            self._defended = now
            yield e.Retain(self._topics.offer, self._said[1])
        elif self._again is None or self._again > now + _DEFENCE:
            self._again = now + _DEFENCE

    def _missed(self, client: str) -> Iterator[e.Action]:
        if self._said is not None:
            yield e.Publish(self._topics.down(client), self._said[1])

    def _said_by(self, client: str, message: m.Message, now: float) -> Iterator[e.Action]:
        match message:
            case m.Hello():
                yield from self._doubled(client, self._conduct.greeted(client, message.boot, now))
                yield from self._greeted(client, message, now)
            case m.Goodbye(boot):
                if self._roster.goodbye(client, boot):
                    yield from self._leaves(client, now)
            case m.Decline():
                yield from self._declines(client, message, now)
            case m.Upload():
                self._roster.count(client, message.traffic)
                yield from self._uploads(client, message, now)
            case m.Missing(sha256, indices):
                for ref in (self.restored.bundle, *self._blobs(), *(ref for ref, _ in self._steering.files)):
                    if ref.sha256 == sha256 and ref.inline is None:
                        yield from self._again_for(client, ref, indices, now)
                        break
            case _:
                raise WireError(f"{type(message).__name__} is not for the server")

    def _again_for(self, client: str, ref: m.BlobRef, indices: tuple[int, ...], now: float) -> Iterator[e.Action]:
        """Publish again what a client misses, as far as it may cause that many bytes."""
        wanted = self._repetition.wanted(ref, indices, now)
        granted = wanted[: self._conduct.afford(client, len(wanted), ref.chunk, now)]
        if granted:
            self._repetition.publish(ref, granted, now)
            yield e.Spread(ref, granted)

    def _greeted(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        if hello.epoch < self.restored.epoch:
            yield from self._missed(client)
        if hello.epoch == self.restored.epoch and hello.bundle == self.restored.bundle.sha256:
            yield e.Seen(client, hello)
            counted, willing = self.settings.limits.count(hello.samples), hello.available
            available = willing and not self._steering.pauses(client)
            hello = msgspec.structs.replace(hello, available=available)
            self._roster.hello(client, msgspec.structs.replace(hello, samples=counted)).willing = willing
            yield from self._comes(client, hello, now)

    def _steered(self, event: e.Steered, now: float) -> Iterator[e.Action]:
        before, self._steering = self._steering, event
        for ref, path in event.files:
            if (ref, path) not in before.files:
                yield e.Adopt(ref, path)
                if self._connected:
                    yield e.Spread(ref)
        for ref, path in before.files:
            if (ref, path) not in event.files:
                yield e.Sweep(ref)
        for client in self._roster.steer(event.pauses):
            if (member := self._roster.get(client)) is not None:
                # As if it had said so itself: a task that it has it ends, and its update counts.
                held = member.boot, self.restored.bundle.sha256, member.version, member.digest, member.samples
                yield from self._comes(client, m.Hello(self.restored.epoch, *held, member.available), now)

    def _inquire(self, client: str, upload: m.Upload) -> Iterator[e.Action]:
        # Of an epoch to come this ledger knows nothing: a newer server does, and will say.
        if upload.epoch <= self.restored.epoch:
            yield e.Inquire(upload.epoch, upload.task, client)

    # Versions.

    def _aggregate(
        self, closes: tuple[tuple[int, int], ...], result: Round, needed: frozenset[int]
    ) -> Iterator[e.Action]:
        """Make the next version of what is recorded for these tasks; ``needed`` are the versions of tasks that stay."""
        self.phase = "aggregate"
        keep = self._roster.versions(recent=self._version - _MEMORY) | needed
        # What the ledger may forget is forgotten here too: a client that comes back with it starts from version 0.
        self._digests = {held: known for held, known in self._digests.items() if held in keep}
        yield e.Aggregate(closes, result, keep)

    def _measure(self, now: float) -> Iterator[e.Action]:
        """The newest version is to be measured, where this is one of those that are."""
        every = self.settings.evaluation.every
        if not every or self._round.number % every:
            yield from self._finish(now)
            return
        self.phase = "measure"
        if self.settings.evaluation.data:
            yield e.Evaluate(self._version)
        else:
            yield from self._ask_clients(now)

    def _finish(self, now: float) -> Iterator[e.Action]:
        result = self._round.finished(self._roster.up, self._roster.down, now)
        if result is not None:
            yield e.FinishRound(result, self._progress.add(result), self._roster.present())
        self._round = OpenRound(self._round.number + 1, now, self._roster.up, self._roster.down)
        self.phase = "waiting"
        yield from self._consider(now)

    def _stop(self, reason: str, now: float) -> Iterator[e.Action]:
        self.phase = "stopped"
        yield from self._proclaim()
        yield e.Stop(reason)

    # Small things.

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(self._topics.down(client), self.voice.tell(client, message))


def _diverged(version: int, clipped: int) -> str:
    return (
        f"version {version}: {clipped} parameters would have gone out of all bounds and stay where they were: "
        "training diverges; a lower learning rate may help"
    )
