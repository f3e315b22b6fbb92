"""The client's state machine: events in, actions out.

It does no I/O, reads no clock and draws no randomness but from the generator it is given, so that the same code runs on
a Pi, in an emulated phone and under a simulator. It holds messages and encoded blobs, never tensors: training, decoding
and storing are actions that a driver carries out, whose results come back as events.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_client.download import Download, Pull
from edge_client.errors import WireError
from edge_client.events import (
    Action,
    Available,
    Cancel,
    Connected,
    Counted,
    Disconnected,
    Done,
    Event,
    Failed,
    Finished,
    Install,
    Installed,
    Log,
    Publish,
    Received,
    Rejected,
    Settle,
    Subscribe,
    Tick,
    Unsubscribe,
    Work,
)
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics

NO_HASH = bytes(32)


@dataclass(frozen=True)
class Pending:
    """An update that is stored and has no receipt yet."""

    epoch: int
    task: int
    update: bytes


@dataclass(frozen=True)
class Held:
    """What a client holds when it starts, as its store remembers it."""

    bundle: bytes = NO_HASH
    version: int = 0
    digest: bytes = NO_HASH
    pending: Pending | None = None
    samples: int = 0


@dataclass(frozen=True)
class SessionSettings:
    """How a client behaves; sizes in bytes, times in seconds."""

    client: str
    federation: str
    software: str = ""
    window: int = 16
    blob_limit: int = 512 * 2**20
    chunk: int = 64 * 1024
    inline: int = m.INLINE_LIMIT
    patience: float = 5.0
    """Without an answer for this long, say it again; doubles each time, up to five minutes."""


@dataclass
class _Announcement:
    pending: Pending
    ref: m.BlobRef
    attempts: int = 0
    at: float = 0.0
    granted: bool = False


@dataclass
class ClientSession:
    """One client of one federation."""

    settings: SessionSettings
    held: Held
    rng: random.Random
    boot: bytes
    dropped: int = 0
    """Messages that were malformed, foreign or too large, and were dropped."""
    _topics: Topics = field(init=False)
    _connected: bool = False
    _available: bool = True
    _traffic: m.Traffic = field(default_factory=m.Traffic)
    _offer: m.Offer | None = None
    _bundle: bytes = NO_HASH
    _rejected: bytes = NO_HASH
    _version: int = 0
    _digest: bytes = NO_HASH
    _samples: int = 0
    _hello_at: float | None = None
    _install_at: float | None = None
    _download: Download | None = None
    _task: m.Invitation | None = None
    _deadline: float | None = None
    _working: bool = False
    _waiting: m.Invitation | None = None
    _upload: _Announcement | None = None

    def __post_init__(self) -> None:
        self._topics = Topics(self.settings.federation)
        self._bundle, self._version, self._digest = self.held.bundle, self.held.version, self.held.digest
        self._samples = self.held.samples
        if self.held.pending is not None:
            self._upload = self._announcement(self.held.pending)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``; None when only another event can change anything."""
        times = [self._hello_at, self._install_at, self._deadline]
        if self._download is not None:
            times.append(self._download.wake)
        if self._upload is not None:
            times.append(self._upload.at)
        due = [time for time in times if time is not None] if self._connected else []
        return min(due, default=None)

    @property
    def idle(self) -> bool:
        """Whether there is no task and no update without a receipt."""
        return self._task is None and self._waiting is None and self._upload is None

    def goodbye(self) -> Publish:
        """What a client says when it leaves; also its last will."""
        return self._say(m.Goodbye(self.boot))

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at monotonic time ``now`` (seconds); return what to do, in order."""
        return list(self._handle(event, now))

    def _handle(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case Connected():
                self._connected = True
                yield Subscribe((self._topics.offer, self._topics.down(self.settings.client)))
                if self._download is not None:
                    yield from self._pull(self._download.start(now), self._download)
            case Disconnected():
                self._connected, self._hello_at = False, None
            case Received(topic, payload):
                yield from self._received(topic, payload, now)
            case Counted(traffic):
                self._traffic = traffic
            case Installed():
                yield from self._installed(event, now)
            case Rejected(bundle, reason):
                self._rejected = bundle
                yield Log(f"bundle {bundle.hex()[:12]} cannot be used here: {reason}")
            case Finished():
                yield from self._finished(event, now)
            case Failed():
                yield from self._failed(event, now)
            case Available(available):
                self._available = available
                self._hello_at = now if self._connected and self._offer is not None else None
                yield from self._tick(now)
            case Tick():
                yield from self._tick(now)

    # What arrives.

    def _received(self, topic: str, payload: bytes, now: float) -> Iterator[Action]:
        try:
            if topic == self._topics.down(self.settings.client):
                yield from self._told(m.decode(payload), now)
                return
            chunk = self._topics.parse_pub(topic)
            if chunk is None:
                yield from self._told(m.decode(payload), now)
            elif self._download is not None and chunk.sha256 == self._download.ref.sha256:
                download = self._download
                yield from self._pull(download.chunk(chunk.index, payload, now), download)
                if download.complete:
                    yield from self._downloaded(download, now)
        except WireError as error:
            self.dropped += 1
            if self.dropped == 1:
                yield Log(f"dropped a message on {topic[:100]}: {error} (further ones are only counted)")

    def _told(self, message: m.Message, now: float) -> Iterator[Action]:
        match message:
            case m.Offer():
                yield from self._offered(message, now)
            case m.Invitation():
                yield from self._invited(message, now)
            case m.Credit(sha256, indices):
                if self._upload is not None and self._upload.ref.sha256 == sha256:
                    yield from self._send(self._upload, indices, now)
            case m.Receipt():
                yield from self._settled(message, now)
            case _:
                raise WireError(f"{type(message).__name__} is not for clients")

    def _offered(self, offer: m.Offer, now: float) -> Iterator[Action]:
        if offer.federation != self.settings.federation:
            raise WireError(f"offer of federation {offer.federation!r}")
        if self._offer is not None and offer.epoch < self._offer.epoch:
            return
        greeted = self._offer is not None and offer.epoch == self._offer.epoch and self._hello_at is not None
        self._offer = offer
        if offer.finished:
            yield Done()
        if offer.bundle.sha256 == self._rejected:
            return
        if offer.bundle.sha256 == self._bundle:
            if not greeted:
                self._hello_at = now + self.rng.uniform(0, offer.spread)
                if self._upload is not None:
                    self._upload.at = self._hello_at
        elif self._download is None or self._download.ref.sha256 != offer.bundle.sha256:
            self._install_at = now + self.rng.uniform(0, offer.spread)
        yield from self._tick(now)

    def _invited(self, invitation: m.Invitation, now: float) -> Iterator[Action]:
        identity = (invitation.epoch, invitation.task)
        if self._upload is not None:
            # The fate of the last update decides which residual the next one starts from, so it is settled first.
            if identity != (self._upload.pending.epoch, self._upload.pending.task):
                self._waiting = invitation
            self._upload.at = now
            yield from self._tick(now)
        elif self._task is not None:
            if identity != (self._task.epoch, self._task.task):
                self._waiting = invitation
                if self._working:
                    yield Cancel()
                else:
                    yield from self._next(now)
        else:
            yield from self._begin(invitation, now)

    def _settled(self, receipt: m.Receipt, now: float) -> Iterator[Action]:
        yield Settle(receipt.epoch, receipt.task, recorded=receipt.status == "recorded")
        if receipt.status == "refused":
            yield Log(f"update for task {receipt.task} refused: {receipt.detail}")
        upload = self._upload
        if upload is not None and (upload.pending.epoch, upload.pending.task) == (receipt.epoch, receipt.task):
            self._upload = None
            yield from self._next(now)

    # A task, from invitation to receipt.

    def _begin(self, invitation: m.Invitation, now: float) -> Iterator[Action]:
        if self._offer is None or self._offer.bundle.sha256 != self._bundle:
            yield self._say(m.Decline(invitation.epoch, invitation.task, "the bundle is not installed yet"))
            return
        if not self._available:
            yield self._say(m.Decline(invitation.epoch, invitation.task, "not available"))
            return
        current = (self._version, self._digest) == (invitation.version, invitation.digest)
        if not current and invitation.held not in (0, self._version):
            # The server is wrong about what this client holds; it invites again after the next hello.
            self._hello_at = now
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
        self._download = self._fetch(invitation.delta)
        yield from self._pull(self._download.start(now), self._download)

    def _work(self, invitation: m.Invitation, delta: bytes | None) -> Iterator[Action]:
        self._working, self._deadline = True, None
        yield Work(invitation, delta)

    def _finished(self, event: Finished, now: float) -> Iterator[Action]:
        self._working, self._task = False, None
        self._version, self._digest = event.version, event.digest
        self._upload = self._announcement(Pending(event.epoch, event.task, event.update))
        self._upload.at = now
        yield from self._tick(now)

    def _failed(self, event: Failed, now: float) -> Iterator[Action]:
        self._working, self._task = False, None
        self._version, self._digest = event.version, event.digest
        if self._waiting is None:
            yield Log(f"task {event.task} failed: {event.reason}")
            yield self._say(m.Decline(event.epoch, event.task, event.reason[:500]))
            self._hello_at = now + self.settings.patience if self._offer is not None else None
        yield from self._next(now)

    def _next(self, now: float) -> Iterator[Action]:
        if self._waiting is None:
            return
        invitation, self._waiting = self._waiting, None
        self._give_up()
        yield from self._begin(invitation, now)

    def _give_up(self) -> None:
        if self._task is not None:
            self._task, self._download, self._deadline = None, None, None

    # The bundle.

    def _installed(self, event: Installed, now: float) -> Iterator[Action]:
        self._bundle, self._version, self._digest = event.bundle, 0, NO_HASH
        self._samples = event.samples
        self._upload = None
        self._hello_at = now
        yield from self._tick(now)

    def _downloaded(self, download: Download, now: float) -> Iterator[Action]:
        self._download = None
        try:
            data = download.take()
        except WireError as error:
            yield Log(f"{error}; downloading again")
            self._download = download
            yield from self._pull(download.start(now), download)
            return
        if self._offer is not None and download.ref.sha256 == self._offer.bundle.sha256:
            yield Install(download.ref.sha256, data)
        elif self._task is not None:
            yield from self._work(self._task, data)

    def _fetch(self, ref: m.BlobRef) -> Download:
        return Download(ref, self.settings.blob_limit, self.settings.window, self.settings.patience)

    def _pull(self, pull: Pull, download: Download) -> Iterator[Action]:
        sha256 = download.ref.sha256
        if pull.drop:
            yield Unsubscribe(tuple(self._topics.published(sha256, index) for index in pull.drop))
        if pull.take:
            yield Subscribe(tuple(self._topics.published(sha256, index) for index in pull.take))
        if pull.ask:
            yield self._say(m.Missing(sha256, pull.ask))

    # What is said, and when.

    def _tick(self, now: float) -> Iterator[Action]:
        if not self._connected or self._offer is None:
            return
        if self._install_at is not None and now >= self._install_at:
            self._install_at = None
            data = transfer.unwrap(self._offer.bundle)
            if data is not None:
                yield Install(self._offer.bundle.sha256, data)
            else:
                self._download = self._fetch(self._offer.bundle)
                yield from self._pull(self._download.start(now), self._download)
        if self._deadline is not None and now >= self._deadline:
            self._give_up()
        if self._download is not None:
            yield from self._pull(self._download.tick(now), self._download)
        if self._hello_at is not None and now >= self._hello_at and self._offer.bundle.sha256 == self._bundle:
            self._hello_at = now + self._offer.heartbeat * self.rng.uniform(0.75, 1.25)
            yield self._say(
                m.Hello(
                    self._offer.epoch,
                    self.boot,
                    self._bundle,
                    self._version,
                    self._digest,
                    self._samples,
                    self._available,
                    self._traffic,
                    self.settings.software,
                )
            )
        upload = self._upload
        if upload is not None and now >= upload.at:
            upload.attempts += 1
            upload.at = now + min(300.0, self.settings.patience * 2**upload.attempts)
            # The bytes that follow are told with the announcement: they count for the round that they belong to.
            coming = 0 if upload.granted else upload.ref.size
            traffic = m.Traffic(self._traffic.sent + coming, self._traffic.received)
            yield self._say(m.Upload(upload.pending.epoch, upload.pending.task, upload.ref, traffic))

    def _send(self, upload: _Announcement, indices: tuple[int, ...], now: float) -> Iterator[Action]:
        upload.attempts, upload.granted = 0, True
        upload.at = now + self.settings.patience * 2
        for index in indices:
            if index < transfer.count(upload.ref):
                topic = self._topics.uploaded(self.settings.client, upload.ref.sha256, index)
                yield Publish(topic, transfer.piece(upload.pending.update, upload.ref, index))

    def _announcement(self, pending: Pending) -> _Announcement:
        ref = transfer.refer(pending.update, chunk=self.settings.chunk, inline=self.settings.inline)
        return _Announcement(pending, ref)

    def _say(self, message: m.Message) -> Publish:
        return Publish(self._topics.up(self.settings.client), m.encode(message))
