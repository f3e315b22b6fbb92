"""Devices that lie, on the topics that are their own: rubbish, false hellos, uploads of anything."""

import asyncio
import random

import numpy as np

from edge_client.codec.update import CodecSettings, encode_update
from edge_client.errors import WireError
from edge_client.manifest import update_layouts
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import PlainMember
from tests import signing
from tests.faults.broker import SimLink
from tests.faults.nodes import Site


class Stranger:
    """One of them."""

    def __init__(self, site: Site, name: str, pace: float) -> None:
        self.site, self.world, self.name, self.pace = site, site.world, name, pace
        self.rng = random.Random(f"{site.world.seed}/{name}")
        self.topics = Topics(site.settings.federation.name)
        self.link = SimLink(site.world, site.broker, name, self.rng)
        self.offer: m.Offer | None = None
        self.upload: bytes = b""
        self.layouts = update_layouts(site.bundle.manifest)
        self.quiet = False
        # A device that was enrolled and lies.
        self.voice = signing.member(self.topics.federation, name) if site.signed else PlainMember()

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
        self.say(message)

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
        self.say(m.Upload(invitation.epoch, invitation.task, blob))

    def say(self, message: m.Message) -> None:
        epoch = 0 if self.offer is None else self.offer.epoch
        self.link.publish(self.topics.up(self.name), self.voice.say(message, epoch))

    def junk(self, size: int) -> bytes:
        return self.rng.randbytes(size)
