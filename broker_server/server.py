"""The driver of one federation: carries out what its coordinator decides, over a link, with one worker thread."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from broker_server import events as e
from broker_server.artifacts import Report
from broker_server.config import Federation
from broker_server.conversation import Conversation
from broker_server.database import Lock
from broker_server.fleet import FleetCare
from broker_server.hush import Hush
from broker_server.metrics import names
from broker_server.modes import coordinator
from broker_server.personal import publishable
from broker_server.records import Round
from broker_server.training import check_hypers
from broker_server.worker import Worker, ledger_path
from edge_client.bundle import Bundle
from edge_client.errors import BundleError, ConfigError, FedgeError, LedgerError
from edge_client.transport import Link
from edge_client.wire import transfer
from edge_client.wire.messages import BlobRef
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Host, PlainHost

if TYPE_CHECKING:
    from broker_server.keyring import Keyring  # a federation that does not sign does not load its library

Result = TypeVar("Result")
_TOGETHER = (e.Record, e.OpenTask)
"""Actions whose commits may wait for one another."""
_WATCH = 1.0
"""Seconds between looks at who is enrolled."""


@dataclass(frozen=True)
class Outcome:
    """How a run of the server ended: why, and the models that it wrote, by folder."""

    reason: str
    models: dict[str, Report]
    dropped: int
    """Messages that were malformed, foreign or too large."""


@dataclass
class Server:
    """One federation on an asyncio loop.

    Raises (from `run`):
        FedgeError: the bundle, the data, the ledger or the broker cannot be used.
    """

    settings: Federation
    log: Callable[[str], None]
    link: Link
    on_round: Callable[[Round], None] = lambda _: None
    on_start: Callable[[e.Restored], None] = lambda _: None
    lock: Lock | None = None
    """The lock on the federation's ledger (`locked`), where it was taken before; else `run` takes it."""
    fit: Callable[[Federation], Awaitable[Federation]] | None = None
    """Finds the settings that fit the broker (`entrance.enter`), before an epoch begins."""
    keyring: "Keyring | None" = None
    """What it signs with, and whom it believes; without one nothing is signed and everybody is believed."""
    hush: Hush | None = None
    """Tells the broker who is muted, where it can be told."""
    fleet: FleetCare | None = None
    """Looks after the devices themselves, where somebody is to."""
    _pool: ThreadPoolExecutor = field(init=False)
    _worker: Worker = field(init=False)
    _coordinator: Conversation = field(init=False)
    _queue: "asyncio.Queue[e.Action]" = field(init=False, default_factory=asyncio.Queue)
    _ended: "asyncio.Future[str]" = field(init=False)
    _timer: asyncio.TimerHandle | None = field(init=False, default=None)
    _watching: asyncio.TimerHandle | None = field(init=False, default=None)
    _ignored: int = field(init=False, default=0)
    """Messages of clients that were muted."""
    _retained: set[str] = field(init=False, default_factory=set)
    _online: bool = field(init=False, default=False)
    _unswept: list[BlobRef] = field(init=False, default_factory=list)
    _built: Counter[bytes] = field(init=False, default_factory=Counter)
    """By hash of a delta, how many are built and not swept."""
    _cleared: dict[str, None] = field(init=False, default_factory=dict)
    """Topics whose clearing is under way: the ledger keeps them until the broker has acknowledged it."""

    async def run(self) -> Outcome:
        """Serve until a stop condition holds or `stop` is called; then write the models."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="worker")
        tasks: list[asyncio.Future[None]] = []
        try:
            self._worker = await self._in_worker(self._open)
            if self.fit is not None:
                fitting = asyncio.ensure_future(self.fit(self.settings))
                await asyncio.wait((fitting, self._ended), return_when=asyncio.FIRST_COMPLETED)
                if not fitting.done():
                    fitting.cancel()
                    return Outcome(self._ended.result(), {}, 0)
                self.settings = fitting.result()
                self._worker.limits = self.settings.transfer
            restored = await self._in_worker(self._worker.start)
            self._coordinator = coordinator(self.settings, restored, self._voice(restored.epoch))
            for answer in await self._in_worker(lambda: list(self._worker.replay(restored))):
                self._feed(answer)
            if self.fleet is not None:
                await self.fleet.start(self._feed, self.settings.transfer.chunk)
            self.on_start(restored)
            if self.keyring is not None:
                self._watch(self.keyring)
            tasks = [asyncio.ensure_future(self._work()), asyncio.ensure_future(self.link.run(self))]
            cares = [care for care in (self.hush, self.fleet) if care is not None]
            tasks += [asyncio.ensure_future(care.run()) for care in cares]
            everything: list[asyncio.Future[Any]] = [*tasks, self._ended]
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
            reason = self._ended.result()
            # A worker that fails meanwhile would leave the queue unfinished for ever.
            await self._until(self._queue.join(), tasks[0])
            models = await self._in_worker(self._worker.write_models)
            self._clear()
            return Outcome(reason, models, self._coordinator.dropped + self._ignored)
        finally:
            for timer in (self._timer, self._watching):
                if timer is not None:
                    timer.cancel()
            if tasks:
                await self.link.close()
                for task in (tasks[0], *tasks[2:]):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            if self.fleet is not None:
                await self.fleet.close()
            if hasattr(self, "_worker"):
                await self._in_worker(self._worker.close)
            self._pool.shutdown()

    def stop(self, reason: str) -> None:
        """End the run; the ledger keeps its state for the next one."""
        if not self._ended.done():
            self._ended.set_result(reason)

    # What the link tells.

    def connected(self) -> None:
        """The broker has accepted the connection."""
        self._online = True
        unswept, self._unswept = self._unswept, []
        for topic in self._unsure():
            self.link.publish(topic, b"", retain=True)
        for ref in unswept:
            self._queue.put_nowait(e.Sweep(ref))
        self._feed(e.Connected())

    def disconnected(self, reason: str) -> None:
        """The connection is gone."""
        self._online = False
        self.log(f"{reason}; trying again")
        self._feed(e.Disconnected())

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        # One that floods must not have its messages weighed: there may be ten thousand a second.
        if self._coordinator.ignores(topic, asyncio.get_running_loop().time()):
            self._ignored += 1
            return
        self._feed(e.Received(topic, payload))

    # Who is believed.

    def _voice(self, epoch: int) -> Host:
        return PlainHost() if self.keyring is None else self.keyring.host(self.settings.federation.name, epoch)

    def _watch(self, keyring: "Keyring") -> None:
        """See what the clock shows and whether devices were enrolled or revoked, and again soon."""
        self._watching = asyncio.get_running_loop().call_later(_WATCH, self._watch, keyring)
        now = time.time()
        self._feed(e.Clock(now))
        try:
            given, gone = keyring.refresh(now)
        except FedgeError as error:
            if not self._ended.done():
                self._ended.set_exception(error)
            return
        if given or gone:
            if self.hush is not None:
                self.hush.lift((*given, *gone))
            self._feed(e.Rekeyed(given, gone))

    # What the coordinator decides.

    def _feed(self, event: e.Event) -> None:
        loop = asyncio.get_running_loop()
        try:
            for action in self._coordinator.handle(event, loop.time()):
                self._act(action)
        except Exception as error:
            # The caller is often the link or a timer, which could do nothing about it.
            if not self._ended.done():
                self._ended.set_exception(error)
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake = self._coordinator.wake
        if wake is not None and not self._ended.done():
            self._timer = loop.call_at(wake, self._feed, e.Tick())

    def _act(self, action: e.Action) -> None:
        match action:
            case e.Publish(topic, payload):
                self.link.publish(topic, payload)
            case e.Subscribe(topics):
                self.link.subscribe(topics)
            case e.Retain(topic, payload):
                self.link.publish(topic, payload, retain=True)
            case e.Log(text):
                self.log(text)
            case e.Seen(client, hello):
                if self.fleet is not None:
                    self.fleet.seen(client, hello)
            case e.Stop(reason):
                self.stop(reason)
            case e.Fenced(epoch):
                raise LedgerError(
                    f"{ledger_path(self.settings)}: the broker has an offer of epoch {epoch}, newer than this server's "
                    f"{self._coordinator.restored.epoch}: another server has taken the federation over; stop that one, "
                    "and serve from its state folder"
                )
            case e.Keep(epoch, task, client, ref, index, data):
                # At once: chunks that waited for the worker would pile up in memory.
                self._worker.spool.keep((epoch, task), client, ref, index, data)
            case e.Clear(topics):
                # At once, before the offer sends clients to topics that may be among them; the ledger in its turn.
                for topic in topics:
                    self.link.publish(topic, b"", retain=True)
                self._queue.put_nowait(action)
            case _:
                if isinstance(action, e.Misconduct) and action.kind == "muted" and self.hush is not None:
                    self.hush.mute(action.client, action.seconds)
                self._queue.put_nowait(action)
                if isinstance(action, e.FinishRound):
                    self.on_round(action.result)

    async def _work(self) -> None:
        """Feed the worker: updates that wait together are recorded in one commit, and so are tasks."""
        while True:
            batch = [await self._queue.get()]
            while isinstance(batch[-1], _TOGETHER) and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._batch(batch)
            finally:
                for _ in batch:
                    self._queue.task_done()

    async def _batch(self, batch: list[e.Action]) -> None:
        together = [action for action in batch if isinstance(action, _TOGETHER)]
        if together:
            for answer in await self._in_worker(lambda: self._worker.perform_all(together)):
                if answer is not None:
                    self._feed(answer)
        for action in batch[len(together) :]:
            match action:
                case e.Spread(ref, indices):
                    await self._spread(ref, indices)
                case e.Sweep(ref):
                    await self._sweep(ref)
                case e.Clear(topics):
                    await self._release(topics, self._sure())
                case _:
                    answer = await self._in_worker(lambda action=action: self._worker.perform(action))  # type: ignore[misc]
                    if isinstance(answer, e.Prepared) and answer.ref.inline is None:
                        self._built[answer.ref.sha256] += 1
                    if answer is not None:
                        self._feed(answer)

    async def _spread(self, ref: BlobRef, indices: tuple[int, ...] | None) -> None:
        wanted = tuple(range(transfer.count(ref))) if indices is None else indices
        topics = Topics(self.settings.federation.name)
        names = [topics.published(ref.sha256, index) for index in wanted]
        if indices is None:
            await self._in_worker(lambda: self._worker.retain(names))
            self._retained.update(names)
        for index, data in self._worker.chunks(ref, wanted):
            self.link.publish(topics.published(ref.sha256, index), data, retain=True)

    async def _sweep(self, ref: BlobRef) -> None:
        if not self._online:
            # What is published now is lost, and a topic that the ledger has released is never cleared again.
            self._unswept.append(ref)
            return
        # Between versions that hardly differ, several deltas have the same bytes.
        self._built[ref.sha256] -= 1
        if self._built[ref.sha256] > 0:
            return
        del self._built[ref.sha256]
        topics = Topics(self.settings.federation.name)
        names = [topics.published(ref.sha256, index) for index in range(transfer.count(ref))]
        sure = self._sure()
        for name in names:
            self.link.publish(name, b"", retain=True)
        self._retained.difference_update(names)
        await self._release(names, sure, ref)

    async def _release(self, topics: Iterable[str], sure: Iterable[str], ref: BlobRef | None = None) -> None:
        """Forget a blob, and what is ``sure``; what was cleared just now may yet be lost on its way."""
        cleared = dict.fromkeys(topics)
        # A delta with the same bytes has the same topics: they may be cleared twice in a row.
        gone = [topic for topic in sure if topic not in cleared]
        for topic in gone:
            self._cleared.pop(topic, None)
        self._cleared |= cleared
        await self._in_worker(lambda: self._worker.release(gone, ref))

    def _sure(self) -> list[str]:
        """Topics that the broker has cleared: it has acknowledged everything."""
        return self._unsure() if self.link.settled else []

    def _unsure(self) -> list[str]:
        """Topics that were cleared, and that nothing has been retained on since."""
        return [topic for topic in self._cleared if topic not in self._retained]

    def _clear(self) -> None:
        """Leave nothing on a broker that outlives this server but the offer, which says whether all is over."""
        for name in self._retained:
            self.link.publish(name, b"", retain=True)

    async def _until(self, job: Coroutine[None, None, None], other: asyncio.Future[None]) -> None:
        """Wait for ``job``, or for the failure of ``other``."""
        waiting = asyncio.ensure_future(job)
        await asyncio.wait((waiting, other), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if other.done():
            other.result()

    async def _in_worker(self, job: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)

    def _open(self) -> Worker:
        data = read_bundle(self.settings)
        check_names(self.settings, Bundle.from_bytes(data))
        return Worker(self.settings, data, self.lock)


def read_bundle(settings: Federation) -> bytes:
    """The bytes of the bundle that clients get.

    Raises:
        BundleError: it cannot be read, or cannot be what the settings ask for.
    """
    path = Path(settings.federation.bundle)
    try:
        return publishable(path.read_bytes(), settings.personal)
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.strerror}; make it with `fedge export`") from error


def check_names(settings: Federation, bundle: Bundle) -> None:
    """Find what the bundle has not got, before every client declines every task for it or a target is never met.

    Raises:
        ConfigError: ``train.hypers`` names an unknown one, or a stop condition an unknown metric.
    """
    check_hypers(settings, bundle.manifest)
    stop, metrics = settings.stop, names(bundle.manifest.metrics)
    if (stop.target is not None or stop.patience) and stop.metric not in metrics:
        raise ConfigError(
            f"stop.metric is {stop.metric!r}, which bundle {bundle.manifest.name!r} does not report; "
            f"known there: {', '.join(sorted(metrics))}"
        )


def locked(settings: Federation) -> Lock:
    """The lock on the federation's ledger: taken before anything is written to the state folder.

    Raises:
        LedgerError: another server has it.
    """
    return Lock(ledger_path(settings))
