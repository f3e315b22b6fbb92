"""The client's state machine: events in, actions out.

It does no I/O, reads no clock and draws no randomness but from the generator it is given, so that the same code runs on
a Pi, in an emulated phone and under a simulator. It holds messages and encoded blobs, never tensors: training, decoding
and storing are actions that a driver carries out, whose results come back as events.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_client import events as e
from edge_client.dating import Dating
from edge_client.download import check_blob
from edge_client.errors import TrustError, WireError
from edge_client.fetching import Fetched, Fetching
from edge_client.greeting import Greeting
from edge_client.held import NO_HASH, Held, SessionSettings
from edge_client.terminal import printable
from edge_client.upload import Outbox, Patience, Pending
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Member, PlainMember


@dataclass
class ClientSession:
    """One client of one federation."""

    settings: SessionSettings
    held: Held
    rng: random.Random
    boot: bytes
    voice: Member = field(default_factory=PlainMember)
    """How it speaks to the server, and what it believes of what it hears."""
    condition: Callable[[], m.Condition] = m.Condition
    """How the device is, asked for each hello."""
    dropped: int = 0
    """Messages that were malformed, foreign, too large or not believed, and were dropped."""
    distrusted: int = 0
    """Those of them that were not believed."""
    _topics: Topics = field(init=False)
    _patience: Patience = field(init=False)
    _outbox: Outbox = field(init=False)
    _connected: bool = False
    _available: bool = True
    _traffic: m.Traffic = field(default_factory=m.Traffic)
    _offer: m.Offer | None = None
    _bundle: bytes = NO_HASH
    _rejected: bytes = NO_HASH
    _version: int = 0
    _digest: bytes = NO_HASH
    _samples: int = 0
    _ask_at: float | None = None
    """When to subscribe to the offer again: it has not come since the connection was made."""
    _asked: int = 0
    _greeting: Greeting = field(init=False)
    _install_at: float | None = None
    _installing: bool = False
    _fetching: Fetching = field(init=False)
    _task: m.Invitation | None = None
    _deadline: float | None = None
    _working: bool = False
    _waiting: m.Invitation | None = None
    _failures: int = 0
    _dating: Dating = field(init=False)

    def __post_init__(self) -> None:
        self._topics = Topics(self.settings.federation)
        self._dating = Dating(self.voice)
        self._patience = Patience(self.settings.patience, self.settings.longest, self.rng)
        self._greeting = Greeting(self._patience, self.rng)
        self._outbox = Outbox(self.settings.inline, self.settings.chunk, self._patience)
        self._bundle, self._version, self._digest = self.held.bundle, self.held.version, self.held.digest
        self._samples = self.held.samples
        self._fetching = Fetching(self.settings, self._topics, self._say, self.held.partial)
        if self.held.pending is not None:
            self._outbox.put(self.held.pending)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``; None when only another event can change anything."""
        if not self._connected:
            return None
        if self._offer is None:
            return self._ask_at
        times = [self._deadline, self._ask_at, self._outbox.wake, self._fetching.wake]
        if self._ready:
            times.append(self._greeting.at)
        if not self._busy:
            times.append(self._install_at)
        return min((time for time in times if time is not None), default=None)

    @property
    def idle(self) -> bool:
        """Whether there is no task and no update without a receipt."""
        return self._task is None and self._waiting is None and self._outbox.empty

    @property
    def _ready(self) -> bool:
        return self._offer is not None and self._offer.bundle.sha256 == self._bundle

    @property
    def _wanted(self) -> bool:
        """Whether the bundle on offer is to be fetched."""
        return self._offer is not None and self._offer.bundle.sha256 not in (self._bundle, self._rejected)

    @property
    def _busy(self) -> bool:
        """Whether the driver is at something that an install must not overtake."""
        return self._working or self._installing

    def goodbye(self) -> e.Publish:
        """What a client says when it leaves; also its last will."""
        return self._say(m.Goodbye(self.boot))

    def handle(self, event: e.Event, now: float) -> list[e.Action]:
        """Take one event at monotonic time ``now`` (seconds); return what to do, in order."""
        return list(self._handle(event, now))

    def _handle(self, event: e.Event, now: float) -> Iterator[e.Action]:
        match event:
            case e.Connected():
                self._connected = True
                self._ask_at, self._asked = now + self.settings.patience, 0
                yield e.Subscribe((self._topics.offer, self._topics.down(self.settings.client)))
                yield from self._fetching.again(now)
            case e.Disconnected():
                self._connected, self._ask_at = False, None
                self._greeting.plan(None)
                self._outbox.interrupt()
            case e.Received(topic, payload):
                yield from self._received(topic, payload, now)
            case e.Counted(traffic):
                self._traffic = traffic
            case e.Clock(wall):
                self._dating.wall = wall
            case e.Installed():
                yield from self._installed(event, now)
            case e.Rejected(bundle, reason):
                self._rejected, self._installing = bundle, False
                self._install_at = self._install_at if self._wanted else None
                yield e.Log(f"bundle {bundle.hex()[:12]} cannot be used here: {reason}")
                yield from self._fetching.discard()
                yield from self._tick(now)
            case e.Finished():
                yield from self._finished(event, now)
            case e.Failed():
                yield from self._failed(event, now)
            case e.Available(available, samples):
                self._available = available
                self._samples = self._samples if samples is None else samples
                self._greeting.plan(now if self._connected and self._ready else None)
                yield from self._tick(now)
            case e.Lacking(sha256, indices):
                yield self._say(m.Missing(sha256, indices))
            case e.Tick():
                yield from self._tick(now)

    # What arrives.

    def _received(self, topic: str, payload: bytes, now: float) -> Iterator[e.Action]:
        yield from self._lapse(now)
        try:
            if topic == self._topics.down(self.settings.client):
                yield from self._told(self.voice.hear(payload), now)
                return
            chunk = self._topics.parse_pub(topic)
            if chunk is None:
                yield from self._told(self.voice.hear(payload), now)
            else:
                yield from self._fetched((yield from self._fetching.chunk(chunk, payload, now)), now)
        except WireError as error:
            self.dropped += 1
            self.distrusted += isinstance(error, TrustError)
            if self.dropped == 1 or (self.distrusted == 1 and isinstance(error, TrustError)):
                why = printable(f"{topic[:100]}: {error}")
                yield e.Log(f"dropped a message on {why} (further ones are only counted)")

    def _told(self, message: m.Message, now: float) -> Iterator[e.Action]:
        match message:
            case m.Offer():
                yield from self._offered(message, now)
            case m.Invitation():
                yield from self._invited(message, now)
            case m.Credit(sha256, indices):
                self._greeting.heard()
                for index, data in self._outbox.grant(sha256, indices, now):
                    yield e.Publish(self._topics.uploaded(self.settings.client, sha256, index), data)
            case m.Receipt():
                self._greeting.heard()
                yield from self._settled(message, now)
            case m.Release():
                yield e.Announced(message)
            case _:
                raise WireError(f"{type(message).__name__} is not for clients")

    def _offered(self, offer: m.Offer, now: float) -> Iterator[e.Action]:
        if offer.federation != self.settings.federation:
            raise WireError(f"offer of federation {offer.federation!r}")
        yield from self._dating.check(offer)
        if self._offer is not None and offer.epoch < self._offer.epoch:
            return
        check_blob(offer.bundle, self.settings.blob_limit)
        self._ask_at = None
        greeted = self._offer is not None and self._greeting.at is not None and self.epoch == offer.epoch
        self._offer = offer
        self._outbox.cut(self.settings.inline, min(self.settings.chunk, offer.bundle.chunk))
        if offer.finished:
            yield e.Done()
        if not self._wanted:
            self._install_at = None
            if self._task is None:
                yield from self._fetching.stop()
        if self._ready:
            if not greeted:
                at = now + self.rng.uniform(0, offer.spread)
                self._greeting.plan(at)
                self._outbox.schedule(at)
        elif self._wanted and not self._fetching.pulls(offer.bundle.sha256):
            if self._install_at is None:
                self._install_at = now + self.rng.uniform(0, offer.spread)
            if self._working:
                yield e.Cancel()
        yield from self._tick(now)

    def _lapse(self, now: float) -> Iterator[e.Action]:
        """Let go of an offer that has expired since it came: whoever holds newer ones back keeps nobody at it."""
        if self._offer is None or not self._dating.late(self._offer):
            return
        yield e.Log("the offer has expired and no newer one has come; waiting for one")
        yield from self._give_up()
        yield from self._fetching.stop()
        self._offer, self._ask_at, self._asked = None, now, 0

    def _invited(self, invitation: m.Invitation, now: float) -> Iterator[e.Action]:
        if invitation.delta is not None:
            check_blob(invitation.delta, self.settings.blob_limit)
        self._greeting.heard()
        if invitation.void is not None:
            # The receipt that said so may be lost, and the next update would start from what it has left over.
            yield from self._settled(m.Receipt(*invitation.void, "void"), now)
        identity = (invitation.epoch, invitation.task)
        if not self._outbox.empty:
            # The fate of the last update decides which residual the next one starts from, so it is settled first.
            if not self._outbox.holds(*identity):
                self._waiting = invitation
            self._outbox.remind(now)
            yield from self._tick(now)
        elif self._task is not None:
            if identity != (self._task.epoch, self._task.task):
                self._waiting = invitation
                if self._working:
                    yield e.Cancel()
                else:
                    yield from self._next(now)
        else:
            yield from self._begin(invitation, now)

    def _settled(self, receipt: m.Receipt, now: float) -> Iterator[e.Action]:
        yield e.Settle(receipt.epoch, receipt.task, recorded=receipt.status == "recorded")
        if receipt.status == "refused":
            yield e.Log(f"update for task {receipt.task} refused: {receipt.detail}")
        if self._outbox.settle(receipt.epoch, receipt.task, now):
            yield from self._next(now)

    # A task, from invitation to receipt.

    def _begin(self, invitation: m.Invitation, now: float) -> Iterator[e.Action]:
        if not self._ready:
            yield self._say(m.Decline(invitation.epoch, invitation.task, "the bundle is not installed yet"))
            return
        if not self._available:
            yield self._say(m.Decline(invitation.epoch, invitation.task, "not available"))
            return
        current = (self._version, self._digest) == (invitation.version, invitation.digest)
        if not current and invitation.held not in (0, self._version):
            # The server is wrong about what this client holds; it invites again after the next hello.
            self._greeting.plan(now)
            yield from self._tick(now)
            return
        self._task = invitation
        if current or invitation.delta is None:
            yield from self._work(invitation, None)
            return
        data = transfer.unwrap(invitation.delta)
        if data is not None:
            yield from self._work(invitation, data)
            return
        self._deadline = now + invitation.deadline
        yield from self._fetched((yield from self._fetching.begin(invitation.delta, now)), now)

    def _work(self, invitation: m.Invitation, delta: bytes | None) -> Iterator[e.Action]:
        self._working, self._deadline = True, None
        yield e.Work(invitation, delta)

    def _finished(self, event: e.Finished, now: float) -> Iterator[e.Action]:
        self._working, self._task, self._failures = False, None, 0
        self._version, self._digest = event.version, event.digest
        yield from self._fetching.discard()
        self._outbox.put(Pending(event.epoch, event.task, event.update))
        if self._connected:
            self._outbox.schedule(now)
        yield from self._tick(now)

    def _failed(self, event: e.Failed, now: float) -> Iterator[e.Action]:
        self._working, self._task = False, None
        self._version, self._digest = event.version, event.digest
        yield from self._fetching.discard()
        if self._waiting is None:
            yield e.Log(f"task {event.task} failed: {event.reason}")
            yield self._say(m.Decline(event.epoch, event.task, event.reason[:500]))
            # A hello brings the next invitation: a client that always fails must not train day and night for nothing.
            self._greeting.plan(now + self._patience.after(self._failures) if self._connected else None)
            self._failures += 1
        yield from self._next(now)
        yield from self._tick(now)

    def _next(self, now: float) -> Iterator[e.Action]:
        if self._waiting is None:
            return
        invitation, self._waiting = self._waiting, None
        yield from self._give_up()
        yield from self._begin(invitation, now)

    def _give_up(self) -> Iterator[e.Action]:
        """Let go of a task whose delta is still on its way."""
        if self._task is not None and not self._working:
            self._task, self._deadline = None, None
            yield from self._fetching.stop()

    # The bundle.

    def _installed(self, event: e.Installed, now: float) -> Iterator[e.Action]:
        self._bundle, self._version, self._digest = event.bundle, 0, NO_HASH
        self._samples = event.samples
        self._outbox.drop()
        self._waiting, self._installing = None, False
        self._install_at = self._install_at if self._wanted else None
        self._greeting.plan(now if self._connected else None)
        yield from self._fetching.discard()
        yield from self._tick(now)

    def _fetched(self, fetched: Fetched | None, now: float) -> Iterator[e.Action]:
        if fetched is None:
            return
        ref, data = fetched
        if self._task is not None:
            yield from self._work(self._task, data)
        elif self._offer is not None and ref.sha256 == self._offer.bundle.sha256:
            self._installing = True
            yield e.Install(ref.sha256, data)

    # What is said, and when.

    def _tick(self, now: float) -> Iterator[e.Action]:
        yield from self._lapse(now)
        if self._connected and self._ask_at is not None and now >= self._ask_at:
            # A broker may lose a retained message too; where there is no server yet, this costs a packet now and then.
            self._asked += 1
            self._ask_at = now + self._patience.after(self._asked)
            yield e.Subscribe((self._topics.offer, self._topics.down(self.settings.client)))
            if self._asked > 1:
                # What is retained may be another's: whom the server hears speak of an older epoch, it tells its offer.
                yield self._hello()
        if not self._connected or self._offer is None:
            return
        if self._install_at is not None and now >= self._install_at and not self._busy:
            self._install_at = None
            yield from self._give_up()
            yield from self._fetching.stop()
            data = transfer.unwrap(self._offer.bundle)
            if data is not None:
                self._installing = True
                yield e.Install(self._offer.bundle.sha256, data)
            else:
                yield from self._fetched((yield from self._fetching.begin(self._offer.bundle, now)), now)
        if self._deadline is not None and now >= self._deadline:
            yield from self._give_up()
        yield from self._fetching.tick(now)
        if self._greeting.at is not None and now >= self._greeting.at and self._ready:
            self._greeting.said(now, self._offer.heartbeat, self._offer.spread)
            yield self._hello()
        upload = self._outbox.say(self._traffic, now)
        if upload is not None:
            yield self._say(upload)

    @property
    def epoch(self) -> int:
        """The server's, by the offer that is believed; 0 where there is none."""
        return 0 if self._offer is None else self._offer.epoch

    def _hello(self) -> e.Publish:
        held = self._bundle, self._version, self._digest, self._samples
        about = self._available, self._traffic, self.settings.software, self.settings.uplink or self._outbox.speed
        return self._say(m.Hello(self.epoch, self.boot, *held, *about, self.condition()))

    def _say(self, message: m.Message) -> e.Publish:
        return e.Publish(self._topics.up(self.settings.client), self.voice.say(message, self.epoch))
