"""Devices as they are on a Pi: a client that is replaced, and root's program beside it, in a scratch root each."""

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

from broker_server.authority import Authority
from deploy.update.updater import Updater as Root
from edge_client.data import ArraySource
from edge_client.device import Device, Workshop
from edge_client.feeds.opening import Feeds
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.service.attendant import Attendant
from edge_client.service.board import Board
from edge_client.service.gate import ALWAYS, Gate
from edge_client.service.notify import Notifier
from edge_client.service.update import Updater
from edge_client.service.wear import Wear
from edge_client.store import FileCopies, Store
from edge_client.trust.keys import verify
from edge_client.trust.release import here
from edge_client.wire.topics import Topics
from tests.deploy.update import bench
from tests.toy import toy_data

DEAF = "VERSION = {version!r}  # deaf\n"
"""A client that starts and never hears a server."""


class Systemd(bench.Client):
    """Starts the client of a `Pi`; called from the thread that root's program runs in."""

    def __init__(self, pi: "Pi") -> None:
        super().__init__(root=pi.root)
        self.pi, self.waited = pi, threading.Event()
        self.wall = time.time

    def wait(self, seconds: float) -> None:
        """Time flies only where nothing is to come."""
        if self.pi.deaf:
            self.time += self.patience
        else:
            self.waited.wait(0.02)

    def restart(self) -> None:
        asyncio.run_coroutine_threadsafe(self.pi.restart(), self.pi.loop).result()


class Pi:
    """One device with its own root."""

    def __init__(self, folder: Path, client: str, hub: MemoryBroker, workshop: Workshop, authority: Authority) -> None:
        self.client, self.hub, self.workshop, self.root = client, hub, workshop, folder / client
        made = bench.Device(self.root, authority.signing)
        self.base, self.staging = made.base, self.root / "var" / "lib" / "fedge" / "state" / "release"
        self.authority, self.loop, self.lines = authority, asyncio.get_running_loop(), list[str]()
        self.lives: list[str] = []
        self.machine = Systemd(self)
        self._over = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._root: asyncio.Task[None] | None = None

    @property
    def runs(self) -> str:
        """The version that is the client."""
        return (self.base / "current").resolve().name

    @property
    def report(self) -> dict[str, str]:
        """What root's program says."""
        found: dict[str, str] = json.loads((self.base / "report.json").read_text())
        return found

    async def start(self) -> None:
        """Boot."""
        self._root = asyncio.create_task(self._watch())
        await self.restart()

    async def stop(self) -> None:
        """Shut down."""
        self._over.set()
        await self._end(self._life)
        await self._end(self._root)

    async def restart(self) -> None:
        """Start what ``current`` leads to."""
        await self._end(self._life)
        self.lives.append(self.runs)
        self._life = None if self.deaf else asyncio.create_task(self._live())

    @property
    def deaf(self) -> bool:
        """Whether the client hears no server."""
        return "deaf" in (self.base / "current" / "client").read_text()

    async def _live(self) -> None:
        source, wear = ArraySource(toy_data(40, seed=1)), Wear()
        device = Device(
            client=self.client,
            federation="toys",
            connect=lambda will: MemoryLink(self.hub, will=will),
            store=Store(self.root / "state", durable=False),
            copies=FileCopies(self.root / "state"),
            workshop=self.workshop,
            open_data=lambda manifest: (source, source),
            log=self.lines.append,
            seed=1,
            software=self.runs,
            updater=self.updater(),
        )
        feeds, board = Feeds("none.npz", self.lines.append), Board(self.root)
        attendant = Attendant(
            device, feeds, Gate(ALWAYS), board, Notifier({}), self.lines.append, 60.0, wear, glance=0.02
        )
        async with attendant.attending():
            try:
                await device.run()
            finally:
                await device.close()

    def updater(self) -> Updater:
        """The client's side of updates."""
        key = self.authority.signing.public
        found = Updater(self.staging, self.base, Topics("toys"), lambda d, s: verify(key, d, s), self.runs, here())
        found.look(joined=False)
        return found

    async def _watch(self) -> None:
        """What `fedge-update.path` does."""
        before = None
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                status = (self.staging / "release.signed").stat()
                if (status.st_ino, status.st_mtime_ns) != before:
                    before = status.st_ino, status.st_mtime_ns
                    await asyncio.to_thread(lambda: Root(self.root, self.machine).run())
            await asyncio.sleep(0.02)

    async def _end(self, task: "asyncio.Task[None] | None") -> None:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
