"""Memory of server and broker while a whole fleet uploads at once: ``make bench-uploads``.

A real ``fedge serve`` and mosquitto, each in a process of its own; here are the clients: real sessions over real
sockets, which say at once that they have trained. All of them have their update ready before the server takes the
first. Resident memory is sampled from the first credit to the last receipt. The last run lets everybody upload at
once, to show what the credits are for. Results go to ``build/bench/uploads.json``.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from federations import BUILD, ROOT, BenchError, machine, toml, write_json

sys.path.insert(0, str(ROOT))

from broker_server.broker import EmbeddedBroker
from broker_server.config import load
from edge_client import events as e
from edge_client.address import Address
from edge_client.bundle import Bundle
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.held import Held, SessionSettings
from edge_client.manifest import update_layouts
from edge_client.session import ClientSession
from edge_client.transport import MqttLink
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import count
from tests.toy import toy_bundle

RESULT = BUILD / "bench" / "uploads.json"
NAME = "uploads"
MIB = 2**20


@dataclass
class Site:
    """What all clients of a run share, and what they add up to."""

    clients: int
    update: bytes
    bundle: bytes
    address: Address
    open: set[str] = field(default_factory=set)
    """Clients that have leave to send, and have not sent everything."""
    most: int = 0
    sent: int = 0
    trained: int = 0
    settled: int = 0
    began: float = 0.0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Client:
    """A real session over a real link, without anything to train."""

    def __init__(self, site: Site, number: int) -> None:
        self.site, self.name = site, f"c{number:04d}"
        self.sent: set[str] = set()
        held = Held(site.bundle, 0, bytes(32), samples=10)
        rng = random.Random(number)
        self.session = ClientSession(SessionSettings(self.name, NAME), held, rng, rng.randbytes(8))
        will = self.session.goodbye()
        self.link = MqttLink(site.address, f"{NAME}-{self.name}", (will.topic, will.payload), attempts=20)
        self.timer: asyncio.TimerHandle | None = None
        self.training: asyncio.Future[None] | None = None
        self.topics = Topics(NAME)

    def connected(self) -> None:
        """The broker has accepted the connection."""
        self.feed(e.Connected())

    def disconnected(self, reason: str) -> None:
        """The connection is gone."""
        print(f"{self.name}: {reason}", file=sys.stderr)
        self.feed(e.Disconnected())

    def message(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        self.feed(e.Received(topic, payload))

    def feed(self, event: e.Event) -> None:
        """Give the session one event and carry out what follows."""
        loop = asyncio.get_running_loop()
        for action in self.session.handle(event, loop.time()):
            self.act(action)
        if self.timer is not None:
            self.timer.cancel()
        wake = self.session.wake
        self.timer = None if wake is None else loop.call_at(wake, self.feed, e.Tick())

    def act(self, action: e.Action) -> None:
        """Carry out one action."""
        match action:
            case e.Publish(topic, payload):
                chunk = self.topics.parse_up(topic)[1]
                if chunk is not None:
                    self.count(topic, len(payload))
                self.link.publish(topic, payload)
            case e.Subscribe(topics):
                self.link.subscribe(topics)
            case e.Unsubscribe(topics):
                self.link.unsubscribe(topics)
            case e.Work(task):
                self.site.trained += 1
                if self.site.trained == self.site.clients:
                    self.site.began = time.monotonic()
                    self.site.ready.set()
                finished = e.Finished(task.epoch, task.task, self.site.update, 0, task.digest)
                self.training = asyncio.ensure_future(self.finish(finished))
            case e.Settle():
                self.site.settled += 1
                if self.site.settled == self.site.clients:
                    self.site.done.set()

    async def finish(self, event: e.Finished) -> None:
        """Wait until all have trained, so that all announce at once."""
        await self.site.ready.wait()
        self.feed(event)

    def count(self, topic: str, size: int) -> None:
        """One chunk goes out."""
        self.site.sent += size
        self.sent.add(topic)
        self.site.open.add(self.name)
        self.site.most = max(self.site.most, len(self.site.open))
        update = self.session._outbox._update
        if update is not None and len(self.sent) == count(update.ref):
            self.site.open.discard(self.name)


class Sampler:
    """The resident memory of some processes: before, and the most there was until stopped."""

    def __init__(self, processes: dict[str, int]) -> None:
        self.processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self.before = self.now()
        self.peak = dict(self.before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def now(self) -> dict[str, float]:
        """MiB of each process."""
        return {name: process.memory_info().rss / MIB for name, process in self.processes.items()}

    def stop(self) -> None:
        """Take the last sample."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            for name, found in self.now().items():
                self.peak[name] = max(self.peak[name], found)


def update_of(bundle: Bundle) -> bytes:
    """An update in full precision: as large as this model's can be."""
    layouts = update_layouts(bundle.manifest)
    delta = np.random.default_rng(1).normal(0, 1e-3, bundle.layout.size).astype(np.float32)
    return encode_update({"delta": delta}, layouts, {"samples": 10.0}, CodecSettings("none")).data


async def take_part(site: Site, processes: dict[str, int], limit: float) -> Sampler:
    """All clients, from hello to receipt."""
    clients = [Client(site, number) for number in range(site.clients)]
    lives = [asyncio.ensure_future(client.link.run(client)) for client in clients]
    try:
        await asyncio.wait_for(site.ready.wait(), limit)
        sampler = Sampler(processes)
        await asyncio.wait_for(site.done.wait(), limit)
        sampler.stop()
    finally:
        await asyncio.gather(*(client.link.close() for client in clients))
        await asyncio.gather(*lives, return_exceptions=True)
    return sampler


def measure(clients: int, size: int, uploads: int, *, limit: float = 600.0) -> dict[str, Any]:
    """One run.

    Args:
        clients: how many upload at once.
        size: bytes of the model in float32, and about those of an update.
        uploads: how many the server lets upload at a time.

    Raises:
        BenchError: the server ended.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        width = max(1, size // 4 // 254)
        (folder / "toy.fedge").write_bytes(toy_bundle(features=250, hidden=width))
        bundle = Bundle.open(folder / "toy.fedge")
        with EmbeddedBroker.start(folder / "broker", kind="mosquitto") as broker:
            sections: dict[str, Any] = {
                "federation": {"name": NAME, "bundle": "toy.fedge"},
                "broker": {"url": broker.url},
                "round": {"cohort": clients, "minimum": clients, "over_select": 1.0, "deadline": limit},
                "codec": {"kind": "none"},
                "evaluation": {"every": 0},
                "transfer": {"uploads": uploads},
                "stop": {"rounds": 1},
            }
            path = folder / "federation.toml"
            path.write_text(toml(sections))
            load(path)
            (mosquitto,) = psutil.Process(broker.pid).children()
            log = (folder / "server.log").open("w+")
            command = [sys.executable, "-m", "edge_client.cli", "serve", str(path)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            with log, subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log) as server:
                site = Site(clients, update_of(bundle), bytes.fromhex(bundle.digest), Address.parse(broker.url))
                try:
                    processes = {"server": server.pid, "broker": mosquitto.pid}
                    sampler = asyncio.run(take_part(site, processes, limit))
                except (TimeoutError, psutil.NoSuchProcess) as error:
                    log.seek(0)
                    raise BenchError(f"{site.settled} of {clients} updates; the server said: {log.read()}") from error
                finally:
                    server.kill()
                seconds = time.monotonic() - site.began
    return {
        "clients": clients,
        "update_bytes": len(site.update),
        "uploads": uploads,
        "most_at_once": site.most,
        "seconds": seconds,
        "mb_per_second": clients * len(site.update) / seconds / 1e6,
        "sent_per_byte": site.sent / (clients * len(site.update)),
        **{f"{name}_before_mib": found for name, found in sampler.before.items()},
        **{f"{name}_peak_mib": found for name, found in sampler.peak.items()},
    }


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--size", type=int, default=2_000_000, help="bytes of an update")
    parser.add_argument("--uploads", type=int, default=16, help="how many may upload at a time")
    arguments = parser.parse_args()
    plan = [(max(1, arguments.clients // part), arguments.uploads) for part in (10, 3, 1)]
    plan.append((arguments.clients, arguments.clients))
    runs = []
    try:
        for clients, uploads in plan:
            runs.append(measure(clients, arguments.size, uploads))
            print(json.dumps(runs[-1]), flush=True)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    largest = runs[-2]
    write_json(RESULT, {**largest, "runs": runs, "machine": machine()})
    print(f"all of it in {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
