"""Clients of a run: driver, session, worker and store as they ship, with a cheap trainer and the reference beside."""

import asyncio
import dataclasses
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_client import events as c
from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout
from edge_client.codec.model import Model
from edge_client.device import Device, Workshop
from edge_client.errors import StoreError
from edge_client.store import FileCopies, Store
from edge_client.wire.envelope import Stamp
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Assembly
from edge_client.wire.voice import Member, PlainMember
from tests import signing
from tests.faults.broker import SimLink
from tests.faults.invariants import ClientView
from tests.faults.nodes import Node, Site
from tests.faults.training import Data, Pull
from tests.faults.world import PowerCut


class WatchedStore(Store):
    """The store, with the reference looking on."""

    def __init__(self, node: "ClientNode") -> None:
        self._node, self._life, self._oracle = node, node.life, node.site.oracle
        super().__init__(node.folder)

    def commit(
        self,
        epoch: int,
        task: int,
        update: bytes,
        residual: bytes | None,
        *,
        version: int,
        digest: bytes,
        settles: Mapping[str, bytes] | None = None,
        keeps: Mapping[str, bytes] | None = None,
    ) -> None:
        self._node.guard(self._life)
        name, oracle = self._node.name, self._oracle
        oracle.made(name, (epoch, task), update, self._node.data.samples)
        oracle.holds(name, epoch, version, digest)
        view = oracle.commits(name, (epoch, task), residual, settles or {})
        self._watched(
            view,
            lambda: super(WatchedStore, self).commit(
                epoch, task, update, residual, version=version, digest=digest, settles=settles, keeps=keeps
            ),
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

    def partial(self) -> Assembly | None:
        found = super().partial()
        self._oracle.finds(self._part, found)
        return found

    def keep(self, ref: BlobRef, index: int, data: bytes) -> None:
        self._node.guard(self._life)
        kept = self._oracle.keeps(self._part, ref, index, data)
        super().keep(ref, index, data)
        kept.whole.add(index)

    def discard(self) -> None:
        self._node.guard(self._life)
        super().discard()
        self._oracle.kept.pop(self._part, None)

    @property
    def _part(self) -> Path:
        return self._node.folder / "download.part"

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
        self.lived = 0
        self.newest, self.passed = Stamp(0, 0, 0), 0.0
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
            voice=self.voice(),
            remember=self.remember,
        )
        device.node = self
        if self.chunked:
            device._session.settings = dataclasses.replace(device._session.settings, inline=0, chunk=1024, keep=0)
        self.main = asyncio.ensure_future(device.run())
        await self.main
        return False

    def voice(self) -> Member:
        """How this life speaks."""
        self.lived += 1
        if not self.site.signed:
            return PlainMember()
        name = self.site.settings.federation.name
        return signing.member(name, self.name, self.lived, newest=self.newest, passed=self.passed)

    def remember(self, newest: Stamp, issued: float) -> None:
        """What `edge_client.trust.witness` does with a file."""
        self.boundary("witness")
        if newest < self.newest:
            self.world.violated(f"{self.name} goes back from the offer {self.newest} to {newest}")
        self.newest, self.passed = newest, max(self.passed, issued)

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
