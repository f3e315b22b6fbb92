"""The driver of one client: carries out what its session decides, over a link, with training slots to work in."""

import asyncio
import contextlib
import dataclasses
import hashlib
import random
import secrets
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from edge_client.bundle import Bundle
from edge_client.data import DataSource
from edge_client.errors import BundleError, DataError, StoreError
from edge_client.events import (
    Announced,
    Available,
    Cancel,
    Clock,
    Connected,
    Counted,
    Discard,
    Disconnected,
    Done,
    Event,
    Failed,
    Finished,
    Install,
    Installed,
    Keep,
    Lacking,
    Log,
    Publish,
    Received,
    Rejected,
    Settle,
    Subscribe,
    Tick,
    Unsubscribe,
    Witness,
    Work,
)
from edge_client.held import NO_HASH, Held, SessionSettings
from edge_client.inspection import inspect
from edge_client.learning.own import stored
from edge_client.manifest import Manifest
from edge_client.reporting import USUAL
from edge_client.service.notify import Pulse
from edge_client.session import ClientSession
from edge_client.shelf import Shelf
from edge_client.store import ModelCopies, Store
from edge_client.trainer import Trainer
from edge_client.transport import Link
from edge_client.wire.envelope import Stamp
from edge_client.wire.messages import BlobRef, Condition
from edge_client.wire.voice import Member, PlainMember
from edge_client.worker import Worker

if TYPE_CHECKING:
    from edge_client.service.update import Updater  # a device that is not enrolled does not load what it checks with

Result = TypeVar("Result")


class OpenData(Protocol):
    """Opens a client's data for a bundle: what it trains on, and what it evaluates on."""

    def __call__(self, manifest: Manifest) -> tuple[DataSource, DataSource]:
        """Raise DataError when the data does not fit."""


class Workshop:
    """Training slots: one thread and one trainer each, shared by all the clients of a process.

    Parameters and runtime sessions live here, so memory grows with the number of slots and not with that of clients.
    ``memory_limit``: bytes that a bundle may declare to need; 0 is no limit.
    """

    def __init__(self, slots: int = 1, *, threads: int = 1, spin: bool = False, memory_limit: int = 0) -> None:
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="slot")
        self._threads = threads
        self._spin = spin
        self._memory_limit = memory_limit
        self._local = threading.local()
        self._bundles: dict[bytes, Bundle] = {}
        self._lock = threading.Lock()

    def open(self, digest: bytes, data: bytes) -> Bundle:
        """The verified bundle of these bytes; opened and inspected once for all clients.

        Raises:
            BundleError: the bytes are not a bundle that this device can use, or should.
        """
        with self._lock:
            bundle = self._bundles.get(digest)
            if bundle is None:
                bundle = Bundle.from_bytes(data)
                inspect(bundle, memory_limit=self._memory_limit)
                self._bundles = {digest: bundle}
            return bundle

    async def run(self, job: Callable[[], Result]) -> Result:
        """Do a job in a free slot."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    def trainer(self, bundle: Bundle) -> Trainer:
        """This slot's trainer for a bundle; called from within a job."""
        trainer: Trainer | None = getattr(self._local, "trainer", None)
        if trainer is None or trainer.bundle.digest != bundle.digest:
            trainer = Trainer(bundle, threads=self._threads, spin=self._spin)
            self._local.trainer = trainer
        return trainer

    def close(self) -> None:
        """Wait for the jobs under way and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Device:
    """One client on an asyncio loop.

    Raises (from `run`):
        DataError: the client's data does not fit the federation's bundle.
        TransportError: the link gave up.
    """

    client: str
    federation: str
    connect: Callable[[tuple[str, bytes]], Link]
    """Makes the link, given the topic and payload of the last will."""
    store: Store
    copies: ModelCopies
    workshop: Workshop
    open_data: OpenData
    log: Callable[[str], None]
    seed: int | None = None
    software: str = ""
    uplink: float = 0.0
    """Bytes a second that the device can send; 0 is not known."""
    boot: bytes = field(default_factory=lambda: secrets.token_bytes(8))
    """What tells this life of the client from earlier ones."""
    voice: Member = field(default_factory=PlainMember)
    """How the client speaks to the server, and what it believes (`edge_client.trust.speech` makes one that signs)."""
    remember: Callable[[Stamp, float], None] = lambda _stamp, _issued: None
    """Remembers over power cuts which offer was the newest that was believed."""
    shelf: Shelf | None = None
    """Where other programs find the newest model."""
    shares: Collection[str] = USUAL
    """What it tells of its data in evaluations, where it is asked (`edge_client.reporting`)."""
    pulse: Pulse = field(default_factory=Pulse)
    """Beats at every training step; pauses them where it is told to."""
    condition: Callable[[], Condition] = Condition
    """How the device is, for each hello."""
    updater: "Updater | None" = None
    """Takes new releases of the client, where there is somebody to install them."""
    greeted: bool = field(init=False, default=False)
    """Whether it has answered an offer that it believes."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the federation says that it has finished."""
    link: Link = field(init=False)
    _session: ClientSession = field(init=False)
    _worker: Worker | None = field(init=False, default=None)
    _bundle: Bundle | None = field(init=False, default=None)
    _timer: asyncio.TimerHandle | None = field(init=False, default=None)
    _stop: threading.Event = field(init=False, default_factory=threading.Event)
    _closing: bool = field(init=False, default=False)
    _keeping: bool = field(init=False, default=True)
    _jobs: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _failure: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _error: Exception | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed if self.seed is not None else secrets.randbits(64))  # noqa: S311
        settings = SessionSettings(self.client, self.federation, software=self.software, uplink=self.uplink)
        held = dataclasses.replace(self._resume(), partial=self.store.partial())
        self._session = ClientSession(settings, held, rng, self.boot, self.voice, self._about)
        goodbye = self._session.goodbye()
        self.link = self.connect((goodbye.topic, goodbye.payload))

    @property
    def dropped(self) -> int:
        """Messages that were malformed or foreign."""
        return self._session.dropped

    async def run(self) -> None:
        """Take part until closed."""
        link = asyncio.ensure_future(self.link.run(self))
        failure = asyncio.ensure_future(self._failure.wait())
        try:
            await asyncio.wait((link, failure), return_when=asyncio.FIRST_COMPLETED)
            if self._error is not None:
                raise self._error
            await link
        finally:
            failure.cancel()
            await self.close()
            await asyncio.gather(link, failure, return_exceptions=True)

    async def close(self) -> None:
        """Say goodbye, stop the task under way, and disconnect; what was stored is taken up at the next start."""
        if self._closing:
            return
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        self._act(self._session.goodbye())
        await self.link.close()
        if self._jobs:
            await asyncio.gather(*self._jobs, return_exceptions=True)

    def available(self, available: bool, samples: int | None = None) -> None:
        """Whether the device may train now; how many samples it has, where that has changed."""
        self.feed(Available(available, samples))

    # What the link tells.

    def connected(self) -> None:
        """The broker has accepted the connection."""
        self.feed(Connected())
        self._update(lambda updater, now: updater.connected(now))

    def disconnected(self, reason: str) -> None:
        """The connection is gone."""
        self.log(f"{self.client}: {reason}; trying again")
        self.feed(Disconnected())

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        self.feed(Received(topic, payload))
        self._update(lambda updater, now: updater.message(topic, payload, now))

    def pull(self) -> None:
        """Time has passed: ask again for what does not come of a release."""
        self._update(lambda updater, now: updater.tick(now))

    # What the session decides.

    def feed(self, event: Event) -> None:
        """Give the session one event and carry out what follows from it."""
        if self._closing or self._error is not None:
            return
        loop = asyncio.get_running_loop()
        try:
            self._session.handle(Counted(self.link.traffic), loop.time())
            self._session.handle(Clock(time.time()), loop.time())
            for action in self._session.handle(event, loop.time()):
                self._act(action)
        except Exception as error:
            # The caller is the link or a timer, which could do nothing about it.
            self.fail(error)
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._session.wake is not None:
            self._timer = loop.call_at(self._session.wake, self.feed, Tick())

    def _act(self, action: object) -> None:
        match action:
            case Publish(topic, payload):
                self.link.publish(topic, payload)
            case Subscribe(topics):
                self.link.subscribe(topics)
            case Unsubscribe(topics):
                self.link.unsubscribe(topics)
            case Install():
                self._start(self._install(action))
            case Work():
                self._stop = threading.Event()
                self._start(self._work(action))
            case Cancel():
                self._stop.set()
            case Settle(epoch, task, recorded):
                self.store.settle(epoch, task, recorded=recorded)
            case Keep(ref, index, data):
                self._keep(ref, index, data)
            case Discard():
                self.store.discard()
            case Witness(stamp, issued):
                self.remember(stamp, issued)
            case Announced(release):
                self._update(lambda updater, now: updater.announced(release, now, time.time()))
            case Lacking():
                self.feed(action)
            case Log(text):
                self.log(f"{self.client}: {text}")
            case Done():
                self.done.set()

    def _update(self, step: "Callable[[Updater, float], Iterable[object]]") -> None:
        if self.updater is not None and not self._closing:
            for action in step(self.updater, asyncio.get_running_loop().time()):
                self._act(action)

    def _about(self) -> Condition:
        # Where no offer comes, hellos are said too, to a server that may never have been heard.
        self.greeted = self.greeted or self._session.epoch > 0
        return self.condition()

    def _keep(self, ref: BlobRef, index: int, data: bytes) -> None:
        """A chunk that cannot be kept is no harm: only a restart would miss it."""
        if not self._keeping:
            return
        try:
            self.store.keep(ref, index, data)
        except StoreError as error:
            self._keeping = False
            self.log(f"{self.client}: {error}; the download goes on, and would start anew after a restart")

    def _start(self, job: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(self._guard(job))
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _guard(self, job: Coroutine[None, None, None]) -> None:
        try:
            await job
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """An error that no one expected ends this client with its traceback, rather than leave it silent."""
        if self._error is None:
            self._error = error
            self._failure.set()

    async def _work(self, work: Work) -> None:
        self.feed(await self._perform(work))

    async def _perform(self, work: Work) -> Finished | Failed:
        worker, bundle = self._worker, self._bundle
        assert worker is not None and bundle is not None  # noqa: PT018
        stop = self._stop

        def job() -> Finished | Failed:
            with self.pulse.busy():
                return worker.perform(work, self.workshop.trainer(bundle), lambda: self.pulse.beat(stop))

        return await self.workshop.run(job)

    async def _install(self, action: Install) -> None:
        try:
            samples = await self.workshop.run(lambda: self._prepare(action.bundle, action.data))
        except BundleError as error:
            self.feed(Rejected(action.bundle, str(error)))
            return
        self.store.install(action.bundle, action.data)
        self.feed(Installed(action.bundle, samples))

    def _prepare(self, digest: bytes, data: bytes) -> int:
        bundle = self.workshop.open(digest, data)
        train, test = self.open_data(bundle.manifest)
        self._bundle = bundle
        self._worker = Worker(self.client, train, test, self.store, self.copies, self.shelf, self.shares)
        return train.samples

    def _resume(self) -> Held:
        """What the store holds; nothing, when its bundle is not whole: the session then fetches it again."""
        data, held = self.store.bundle(), self.store.held()
        if data is None or hashlib.sha256(data).digest() != held.bundle:
            return Held()
        try:
            held = dataclasses.replace(held, samples=self._prepare(held.bundle, data))
        except (BundleError, DataError) as error:
            # Data that does not fit may be there for the next bundle, which only the federation knows of.
            self.log(f"{self.client}: stored bundle: {error}; asking for the bundle again")
            return Held()
        bundle = self._bundle
        copy = None if bundle is None or not held.version else self.copies.load(held.digest, bundle.layout)
        if copy is not None and bundle is not None and self.shelf is not None:
            own = stored(bundle, copy, self.store.recall)
            with contextlib.suppress(StoreError):
                # What was fine-tuned is nowhere else than on the shelf.
                if not self.shelf.tuned(bundle) or (own is not None and own.kind == "ditto"):
                    self.shelf.put(bundle, copy, held.version, own)
        if held.version and bundle is not None and copy is None:
            # Said now, the server sends the whole difference; found out later, it costs a task.
            self.store.hold(0, NO_HASH)
            held = dataclasses.replace(held, version=0, digest=NO_HASH)
        return held
