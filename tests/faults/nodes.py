"""The nodes of a run: the drivers that ship, on virtual time, each with someone who starts it again when it dies."""

import asyncio
import dataclasses
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker_server import events as e
from broker_server.config import Federation
from broker_server.database import Lock
from broker_server.server import Outcome, Server, locked
from broker_server.worker import ledger_path
from edge_client import events as c
from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout
from edge_client.codec.model import Model
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.device import Device, Workshop
from edge_client.errors import FedgeError, LedgerError, StoreError, WireError
from edge_client.manifest import update_layouts
from edge_client.store import FileCopies, Store
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from tests.faults.broker import SimBroker, SimLink
from tests.faults.disk import Disks, Medium
from tests.faults.invariants import ClientView, Oracle
from tests.faults.training import Data, Pull
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
    disk_faults: bool = False
    """Whether a disk may refuse in this run: a node may then stop with a message, and is started again."""


class Node:
    """Something that lives, dies at any boundary between two of its actions, and is started again."""

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
        else:
            self.medium.flush()
        if self.main is not None:
            self.main.cancel()

    kind = "node"

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


# Clients.


class WatchedStore(Store):
    """The store, with the reference looking on."""

    def __init__(self, node: "ClientNode") -> None:
        self._node, self._life, self._oracle = node, node.life, node.site.oracle
        super().__init__(node.folder)

    def commit(
        self, epoch: int, task: int, update: bytes, residual: bytes | None, *, version: int, digest: bytes
    ) -> None:
        self._node.guard(self._life)
        name, oracle = self._node.name, self._oracle
        oracle.made(name, (epoch, task), update, self._node.data.samples)
        oracle.holds(name, epoch, version, digest)
        view = oracle.commits(name, (epoch, task), residual)
        self._watched(
            view,
            lambda: super(WatchedStore, self).commit(epoch, task, update, residual, version=version, digest=digest),
        )

    def settle(self, epoch: int, task: int, *, recorded: bool) -> None:
        self._node.guard(self._life)
        view = self._oracle.settles(self._node.name, (epoch, task), recorded)
        self._watched(view, lambda: super(WatchedStore, self).settle(epoch, task, recorded=recorded))

    def hold(self, version: int, digest: bytes) -> None:
        self._node.guard(self._life)
        super().hold(version, digest)

    def install(self, digest: bytes, bundle: bytes) -> None:
        self._node.guard(self._life)
        self._watched(ClientView(), lambda: super(WatchedStore, self).install(digest, bundle))

    def _watched(self, view: ClientView, write: Callable[[], None]) -> None:
        try:
            write()
        except (PowerCut, StoreError):
            self._oracle.doubts(self._node.name, view)
            raise
        self._oracle.stored(self._node.name, view, self)


class WatchedCopies(FileCopies):
    """The model copies of one life."""

    def __init__(self, node: "ClientNode") -> None:
        super().__init__(node.folder)
        self._node, self._life = node, node.life

    def load(self, digest: bytes, layout: Layout) -> Model | None:
        self._node.guard(self._life)
        return super().load(digest, layout)

    def save(self, digest: bytes, model: Model, replaces: bytes) -> None:
        self._node.guard(self._life)
        super().save(digest, model, replaces)


class Bench(Workshop):
    """Training slots in virtual time: a job takes a while, and so does the news of its end."""

    def __init__(self, node: "ClientNode") -> None:
        super().__init__(1)
        self._node, self._life = node, node.life

    async def run(self, job: Callable[[], Any]) -> Any:
        node = self._node
        await asyncio.sleep(node.rng.uniform(0.1, node.seconds))
        node.guard(self._life)
        node.boundary("job begins")
        result = job()
        node.boundary("job ends")
        await asyncio.sleep(node.rng.uniform(0.0, 0.2))
        node.guard(self._life)
        return result

    def trainer(self, bundle: Bundle) -> Any:
        return Pull(bundle)


class SimDevice(Device):
    """A device that may die between any two of its actions."""

    node: "ClientNode"

    def _act(self, action: object) -> None:
        if not isinstance(action, c.Log):
            self.node.boundary(type(action).__name__)
        super()._act(action)

    async def _perform(self, work: c.Work) -> c.Finished | c.Failed:
        node, life = self.node, self.node.life
        answer = await super()._perform(work)
        node.guard(life)
        return answer


class ClientNode(Node):
    """A client and its owner."""

    kind = "client"

    def __init__(self, site: Site, name: str, data: Data, seconds: float, *, chunked: bool) -> None:
        super().__init__(site, name)
        self.data, self.seconds, self.chunked = data, seconds, chunked
        self.folder = site.folder / name
        self.device: SimDevice | None = None
        self.done = False
        site.disks.add(self.folder, self.medium)

    async def lives(self) -> bool:
        store = WatchedStore(self)
        self.site.oracle.boots(self.name, store)
        rng = random.Random(self.rng.random())

        def connect(will: tuple[str, bytes]) -> SimLink:
            self.link = SimLink(self.world, self.site.broker, self.name, rng, will)
            life = self.life

            def tap(topic: str, payload: bytes, retain: bool) -> None:
                self.guard(life)
                self.world.said(self.name, topic, payload)

            self.link.tap = tap
            return self.link

        self.device = device = SimDevice(
            client=self.name,
            federation=self.site.settings.federation.name,
            connect=connect,
            store=store,
            copies=WatchedCopies(self),
            workshop=Bench(self),
            open_data=lambda manifest: (self.data, self.data),  # type: ignore[arg-type, return-value]
            log=lambda line: self.world.note(self.name, f"log {line}"),
            seed=self.rng.getrandbits(32),
            boot=self.rng.randbytes(8),
        )
        device.node = self
        if self.chunked:
            device._session.settings = dataclasses.replace(device._session.settings, inline=0, chunk=1024)
        self.main = asyncio.ensure_future(device.run())
        await self.main
        return False

    async def leave(self) -> None:
        """The owner stops the client properly."""
        if self.alive and self.device is not None and self.main is not None:
            self.down = self.rng.uniform(1.0, 60.0)
            await self.device.close()

    def lose_card(self) -> None:
        """The client dies, and its SD card with it."""
        if self.alive:
            self.power, self.down = False, self.rng.uniform(1.0, 60.0)
            self.crash("card lost")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.site.oracle.forgets(self.name)


# The server.


class SimServer(Server):
    """A server whose worker takes its time, and which may die between any two of its actions."""

    node: "ServerNode"
    born: int

    def _act(self, action: e.Action) -> None:
        if not isinstance(action, e.Log):
            self.node.boundary(type(action).__name__)
        self.node.queued(self._queue.qsize())
        super()._act(action)

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


# Strangers.


class Stranger:
    """A device that lies, on the topics that are its own: rubbish, false hellos, uploads of anything, and replays."""

    def __init__(self, site: Site, name: str, pace: float) -> None:
        self.site, self.world, self.name, self.pace = site, site.world, name, pace
        self.rng = random.Random(f"{site.world.seed}/{name}")
        self.topics = Topics(site.settings.federation.name)
        self.link = SimLink(site.world, site.broker, name, self.rng)
        self.offer: m.Offer | None = None
        self.upload: bytes = b""
        self.layouts = update_layouts(site.bundle.manifest)
        self.quiet = False

    async def live(self) -> None:
        running = asyncio.ensure_future(self.link.run(self))
        try:
            while not self.quiet:
                await asyncio.sleep(self.rng.expovariate(1 / self.pace))
                self.lie()
        finally:
            self.link.kill()
            running.cancel()

    def connected(self) -> None:
        self.link.subscribe((self.topics.offer, self.topics.down(self.name)))

    def disconnected(self, reason: str) -> None:
        pass

    def message(self, topic: str, payload: bytes) -> None:
        try:
            message = m.decode(payload)
        except WireError:
            return
        match message:
            case m.Offer():
                self.offer = message
            case m.Invitation():
                self.invited(message)
            case m.Credit(sha256, indices):
                for index in indices:
                    data = (
                        self.upload[index * 1024 : (index + 1) * 1024] if self.rng.random() < 0.5 else self.junk(1024)
                    )
                    self.link.publish(self.topics.uploaded(self.name, sha256, index), data)

    def lie(self) -> None:
        """Say something that is not so."""
        rng, offer = self.rng, self.offer
        self.world.strike("hostile message", self.name)
        kind = rng.randrange(8)
        if kind == 0:
            self.link.publish(self.topics.up(self.name), self.junk(rng.choice([3, 200, 5000])))
            return
        if kind == 1:
            self.link.publish(self.topics.uploaded(self.name, self.junk(32), rng.randrange(10**6)), self.junk(1024))
            return
        if offer is None:
            return
        task = rng.randrange(1, 30)
        message: m.Message
        match kind:
            case 2 | 3:
                held = offer.bundle.sha256 if rng.random() < 0.8 else self.junk(32)
                version = rng.choice([0, 0, rng.randrange(50)])
                state = bytes(32) if not version else self.junk(32)
                about = m.Traffic(rng.randrange(10**9), rng.randrange(10**9))
                message = m.Hello(offer.epoch, self.junk(8), held, version, state, rng.randrange(10**6), True, about)
            case 4:
                message = m.Decline(offer.epoch, task, "\x1b[31m no")
            case 5:
                message = m.Missing(offer.bundle.sha256, tuple(rng.randrange(10**6) for _ in range(5)))
            case 6:
                blob = m.BlobRef(self.junk(32), rng.randrange(1, 2**40), 1024)
                message = m.Upload(offer.epoch, task, blob)
            case _:
                message = m.Goodbye(self.junk(8))
        self.link.publish(self.topics.up(self.name), m.encode(message))

    def invited(self, invitation: m.Invitation) -> None:
        """Answer an invitation in bad faith: with rubbish, with an update that claims too much, or not at all."""
        kind = self.rng.randrange(4)
        if kind == 0:
            return
        data = self.junk(300)
        if kind > 1 and invitation.kind == "train":
            samples = self.rng.randrange(1, 100)
            rng = np.random.default_rng(self.rng.getrandbits(32))
            vectors = {
                name: rng.normal(0, 0.1, layout.size).astype(np.float32) for name, layout in self.layouts.items()
            }
            data = encode_update(vectors, self.layouts, {"samples": samples}, CodecSettings(kind="none")).data
            self.site.oracle.made(self.name, (invitation.epoch, invitation.task), data, samples)
        self.upload = data
        blob = transfer.refer(data, chunk=1024, inline=self.rng.choice([0, 16384]))
        self.link.publish(self.topics.up(self.name), m.encode(m.Upload(invitation.epoch, invitation.task, blob)))

    def junk(self, size: int) -> bytes:
        return self.rng.randbytes(size)
