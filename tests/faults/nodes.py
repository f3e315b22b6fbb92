"""The nodes of a run: the drivers that ship, on virtual time, each with someone who starts it again when it dies."""

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from broker_server import events as e
from broker_server.config import Federation
from broker_server.database import Lock
from broker_server.records import Task
from broker_server.server import Outcome, Server, locked
from broker_server.spool import Identity, Spool
from broker_server.worker import Worker, ledger_path
from edge_client.bundle import Bundle
from edge_client.errors import FedgeError, LedgerError, StoreError
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Checklist
from edge_client.wire.voice import SignedHost
from tests import signing
from tests.faults.broker import SimBroker, SimLink
from tests.faults.disk import Disks, Medium
from tests.faults.invariants import Oracle
from tests.faults.world import PowerCut, World


@dataclass
class Site:
    """What all nodes of one run stand on."""

    world: World
    broker: SimBroker
    disks: Disks
    oracle: Oracle
    settings: Federation
    bundle: Bundle
    folder: Path
    signed: bool = False
    """Whether both sides sign what they say."""
    disk_faults: bool = False
    """Whether a disk may refuse in this run: a node may then stop with a message, and is started again."""


class Node:
    """Something that lives, dies at any boundary between two of its actions, and is started again."""

    kind = "node"
    folder: Path

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.world, self.name = site, site.world, name
        self.rng = random.Random(f"{site.world.seed}/{name}")
        self.medium = Medium(site.world, name, self.rng, self.boundary)
        self.alive = False
        self.fuse: int | None = None
        self.power = True
        self.down = 1.0
        self.retired = False
        self.link: SimLink | None = None
        self.main: asyncio.Task[Any] | None = None
        self.life = 0

    def crash_at(self, boundary: int, *, power: bool, down: float) -> None:
        """Die at this boundary from now, counted from 1; ``power``: as in a power cut, else as by ``kill -9``."""
        self.fuse, self.power, self.down = boundary, power, down

    def boundary(self, label: str) -> None:
        """The node is between two actions."""
        if self.fuse is None:
            return
        self.fuse -= 1
        if self.fuse <= 0:
            self.crash(label)
            raise PowerCut(self.name)

    def crash(self, label: str) -> None:
        """End this life at once."""
        self.fuse = None
        if not self.alive:
            return
        self.world.strike(f"{self.kind} {'power cut' if self.power else 'kill'}", self.name, label)
        self.alive = False
        self.life += 1
        if self.link is not None:
            self.link.kill()
        if self.power:
            self.medium.lose_power()
            self.site.oracle.power_lost(self.folder)
        else:
            self.medium.flush()
        if self.main is not None:
            self.main.cancel()

    async def supervise(self) -> None:
        """Start, and start again, until retired."""
        while not self.retired:
            self.alive = True
            life = self.life
            try:
                if await self.lives():
                    self.alive = False
                    return
            except (PowerCut, asyncio.CancelledError):
                if self.alive and self.life == life:
                    raise
            except FedgeError as error:
                # A dead process says nothing; a living one may stop with a message where its disk refuses.
                if self.life == life:
                    self.world.note(self.name, f"stops: {error}")
                    if not self.excused(error):
                        self.world.violated(f"{self.name} stops: {error!r}")
                    self.life += 1
                    self.alive = False
                    self.down = self.rng.uniform(2.0, 10.0)
                    self.medium.flush()
            self.alive = False
            await asyncio.sleep(self.down)

    def excused(self, error: FedgeError) -> bool:
        """Whether a node may stop for this reason."""
        return self.site.disk_faults and isinstance(error, StoreError | LedgerError)

    async def lives(self) -> bool:
        """One life; True when the node is done."""
        raise NotImplementedError

    def guard(self, life: int) -> None:
        """Code of a dead life goes no further."""
        if life != self.life:
            raise PowerCut(self.name)


class WatchedSpool(Spool):
    """The updates under way, with the reference looking on."""

    def __init__(self, node: "ServerNode", folder: Path, limit: int) -> None:
        super().__init__(folder, limit=limit)
        self._oracle = node.site.oracle

    def restore(self, tasks: Iterable[Task]) -> dict[str, Checklist]:
        tasks = list(tasks)
        found = super().restore(tasks)
        last = {client: (task.epoch, task.task) for task in tasks for client in task.cohort}
        wanted = {self._path(identity, client): (identity, client) for client, identity in last.items()}
        for file in [file for file in self._oracle.kept if file.parent == self._folder and file not in wanted]:
            del self._oracle.kept[file]
        for file, (identity, client) in wanted.items():
            self._oracle.finds(file, self._file(identity, client).assembly() if client in found else None)
        return found

    def keep(self, identity: Identity, client: str, ref: BlobRef, index: int, data: bytes) -> None:
        kept = self._oracle.keeps(self._path(identity, client), ref, index, data)
        super().keep(identity, client, ref, index, data)
        kept.whole.add(index)

    def discard(self, identity: Identity, client: str | None = None) -> None:
        super().discard(identity, client)
        for file in [file for file in self._oracle.kept if file.parent == self._folder]:
            if not file.exists():
                del self._oracle.kept[file]

    def _path(self, identity: Identity, client: str) -> Path:
        return self._folder / f"{identity[0]}-{identity[1]}-{client}.part"


class SimKeyring:
    """Whom a server believes: everybody who signs with the key of its name."""

    def host(self, federation: str, epoch: int) -> SignedHost:
        return signing.host(federation, epoch)

    def refresh(self, now: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        del now
        return (), ()


class SimServer(Server):
    """A server whose worker takes its time, and which may die between any two of its actions."""

    node: "ServerNode"
    born: int

    def _act(self, action: e.Action) -> None:
        if not isinstance(action, e.Log):
            self.node.boundary(type(action).__name__)
        self.node.queued(self._queue.qsize())
        super()._act(action)

    def _open(self) -> Worker:
        worker = super()._open()
        worker.spool = WatchedSpool(self.node, worker.spool._folder, worker.spool._limit)
        return worker

    async def _in_worker(self, job: Callable[[], Any]) -> Any:
        node = self.node
        if self.born != node.life:
            if hasattr(self, "_worker") and job == self._worker.close:
                return job()
            raise PowerCut(node.name)
        async with node.turn:
            await asyncio.sleep(node.rng.uniform(0.0, node.slow))
            node.guard(self.born)
            result = job()
            await asyncio.sleep(node.rng.uniform(0.0, node.slow))
            node.guard(self.born)
        return result


class ServerNode(Node):
    """A server and its operator."""

    kind = "server"

    def __init__(self, site: Site, folder: Path, name: str = "server") -> None:
        super().__init__(site, name)
        self.settings = _with_state(site.settings, folder)
        self.folder = folder
        self.slow = self.rng.choice([0.001, 0.01, 0.2])
        self.outcome: Outcome | None = None
        self.turn = asyncio.Lock()
        self.deepest = 0
        site.disks.add(folder, self.medium)
        site.disks.add(folder / "uploads", self.medium)
        view = site.oracle.ledger(str(folder))
        self.medium.committed = lambda connection: site.oracle.committed(view, connection)
        self.view = view

    def queued(self, depth: int) -> None:
        """The server has this many actions waiting for its worker."""
        self.deepest = max(self.deepest, depth)
        most = 50 + 8 * len(self.site.oracle.samples)
        if depth > most:
            self.world.violated(f"{depth} actions wait for the server's worker; expected at most {most}")

    async def lives(self) -> bool:
        self.turn = asyncio.Lock()
        rng = random.Random(self.rng.random())
        self.link = link = SimLink(self.world, self.site.broker, "server", rng)
        life = self.life

        def tap(topic: str, payload: bytes, retain: bool) -> None:
            self.guard(life)
            self.boundary("publish")
            self.world.said(self.name, topic, payload)
            if not retain:
                self.site.oracle.server_says(self.view, topic, payload)

        link.tap = tap
        lock = locked(self.settings)
        try:
            server = SimServer(self.settings, lambda line: self.world.note(self.name, f"log {line}"), link, lock=lock)
            server.keyring = SimKeyring() if self.site.signed else None  # type: ignore[assignment]
            server.node, server.born = self, self.life
            self.main = asyncio.ensure_future(server.run())
            self.outcome = await self.main
        finally:
            lock.close()
        return True

    def excused(self, error: FedgeError) -> bool:
        if "another server has taken the federation over" in str(error):
            newest = max(view.epoch for view in self.site.oracle.ledgers)
            self.retired = newest > self.view.epoch
            return self.retired
        return super().excused(error)

    def second(self) -> None:
        """Someone starts the server once more on the same folder: it must refuse while the first one lives."""
        if not self.alive:
            return
        self.world.strike("second server", self.name)
        try:
            Lock(ledger_path(self.settings)).close()
        except LedgerError:
            return
        self.world.violated("a second server may write to the ledger while the first one lives")


def _with_state(settings: Federation, folder: Path) -> Federation:
    identity = msgspec.structs.replace(settings.federation, state=str(folder))
    return msgspec.structs.replace(settings, federation=identity)
