"""What the server of every federation does, whatever its rounds: the offer, who is there, what clients say, versions.

It does no I/O, reads no clock and draws its randomness from the federation's seed. It holds ids, never tensors:
decoding, aggregating, evaluating and writing to the ledger are actions, done by a worker, whose results come back as
events.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.config import Federation
from broker_server.ledger import Round
from broker_server.roster import Roster
from broker_server.rounds import OpenRound
from broker_server.stopping import Progress
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Chunk, Topics

Phase = Literal["waiting", "train", "aggregate", "measure", "gather", "evaluate", "stopped"]
_MEMORY = 32
"""Versions for which one is kept that only clients hold who are away; later the whole difference is hardly larger."""
_HEARTBEAT = 300.0
"""Seconds between hellos of an idle client, give or take a quarter."""
_MISSED = 3.0
"""Heartbeats without a word after which a client is taken for dead: its last will may be lost."""
_GREETINGS = 200
"""Hellos a second that a fleet may answer an offer with."""
_GATHER = 10.0
"""Seconds, beside the spread, in which a fleet may come back after a restart; then it goes on with who is there."""


@dataclass
class Conversation(ABC):
    """One federation's side of everything that is said; tasks, and what is asked of whom, are left to its kinds."""

    settings: Federation
    restored: e.Restored
    dropped: int = 0
    """Messages that were malformed, foreign or too large, and were dropped."""
    phase: Phase = field(init=False, default="waiting")
    _topics: Topics = field(init=False)
    _roster: Roster = field(init=False)
    _progress: Progress = field(init=False)
    _task: int = field(init=False)
    _version: int = field(init=False)
    _digests: dict[int, bytes] = field(init=False, default_factory=dict)
    _round: OpenRound = field(init=False)
    _gather: float | None = field(init=False, default=None)
    _connected: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        restored = self.restored
        self._topics = Topics(self.settings.federation.name)
        self._roster = Roster(not restored.rounds, _MISSED * _HEARTBEAT, dict(restored.voids))
        # A round whose evaluation goes on has its result in the ledger already, and is counted when it is finished.
        finished = [result for result in restored.rounds if result.round != restored.unfinished]
        self._progress = Progress(self.settings.stop, finished)
        self._task, self._version = restored.last_task, restored.version
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
    def _chunk(self, client: str, chunk: Chunk, payload: bytes, now: float) -> Iterator[e.Action]:
        """A chunk of an update has come.

        Raises:
            WireError: it was not asked for.
        """

    @abstractmethod
    def _uploads(self, client: str, upload: m.Upload, now: float) -> Iterator[e.Action]:
        """A client has an update."""

    @abstractmethod
    def _declines(self, client: str, decline: m.Decline, now: float) -> Iterator[e.Action]:
        """A client cannot do a task."""

    @abstractmethod
    def _leaves(self, client: str, now: float) -> Iterator[e.Action]:
        """A client is gone."""

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
            case e.Aggregated(version, digest, clipped):
                if self.phase == "aggregate":
                    self._version, self._digests[version] = version, digest
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
        yield e.Subscribe((self._topics.every_up, self._topics.offer))
        if self.restored.bundle.inline is None:
            yield e.Spread(self.restored.bundle)
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
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
        """When clients may have been silent for too long."""
        return None if self.phase == "stopped" else self._roster.wake

    def _offer(self) -> m.Offer:
        return m.Offer(
            self.settings.federation.name,
            self.restored.epoch,
            self.restored.bundle,
            self._spread,
            _HEARTBEAT,
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
            else:
                yield from self._chunk(client, chunk, payload, now)
            self._roster.hear(client, now)
        except WireError as error:
            self.dropped += 1
            if self.dropped == 1:
                yield e.Log(f"dropped a message on {printable(topic[:100])}: {error} (further ones are only counted)")

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
                if self._roster.goodbye(client, boot):
                    yield from self._leaves(client, now)
            case m.Decline():
                yield from self._declines(client, message, now)
            case m.Upload():
                self._roster.count(client, message.traffic)
                yield from self._uploads(client, message, now)
            case m.Missing(sha256, indices):
                for ref in (self.restored.bundle, *self._blobs()):
                    if ref.sha256 == sha256 and ref.inline is None:
                        yield e.Spread(ref, tuple(index for index in indices if index < transfer.count(ref)))
            case _:
                raise WireError(f"{type(message).__name__} is not for the server")

    def _greeted(self, client: str, hello: m.Hello, now: float) -> Iterator[e.Action]:
        if hello.epoch < self.restored.epoch:
            # It has missed this epoch's offer.
            yield self._tell(client, self._offer())
        if hello.epoch == self.restored.epoch and hello.bundle == self.restored.bundle.sha256:
            self._roster.hello(client, hello)
            yield from self._comes(client, hello, now)

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

    def _stop(self, reason: str) -> Iterator[e.Action]:
        self.phase = "stopped"
        yield e.Retain(self._topics.offer, m.encode(self._offer()))
        yield e.Stop(reason)

    # Small things.

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(self._topics.down(client), m.encode(message))


def _diverged(version: int, clipped: int) -> str:
    return (
        f"version {version}: {clipped} parameters would have gone out of all bounds and stay where they were: "
        "training diverges; a lower learning rate may help"
    )


def printable(text: str) -> str:
    """What a stranger says, fit for an operator's terminal: on one line and without escape sequences."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
