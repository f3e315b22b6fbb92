"""Many emulated phones in one process: one event loop, one training slot for each core, no thread a phone.

A phone is its data, its small state and its session. It runs the same session, worker and trainer as a Pi, over an MQTT
connection of its own; only the training slots and the copies of the global model are shared, because every phone at one
version holds the same bits.
"""

import asyncio
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edge_client.address import Address
from edge_client.codec.layout import Layout
from edge_client.codec.model import Model
from edge_client.data import Arrays, ArraySource, DataSource, check, load_arrays, split
from edge_client.device import Device, Workshop
from edge_client.emulator.link import RadioLink
from edge_client.emulator.partition import Indices, partition
from edge_client.emulator.profile import PhoneProfile, draw_profiles
from edge_client.errors import DataError
from edge_client.events import Failed, Finished, Work
from edge_client.manifest import Manifest
from edge_client.reporting import sharing
from edge_client.store import Store
from edge_client.tls import Tls
from edge_client.transport import Link, MqttLink
from edge_client.wire.envelope import Stamp
from edge_client.wire.voice import Member, PlainMember


class FleetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fleet: where its broker is, how many phones it has, how the data is split over them, and what they are like."""

    url: str
    """The broker's; empty where it is the first line of standard input, as a password is not for a file."""
    federation: str
    state: str
    """Folder for the phones' state."""
    data: str
    """An ``.npz`` file with the samples of all phones, or ``module:callable``."""
    clients: Annotated[int, Meta(ge=1)]
    split: Literal["iid", "dirichlet", "shards", "natural"] = "iid"
    alpha: float = 0.3
    shards: int = 2
    key: str = "user"
    """Name of the array that holds each sample's user, for the natural split."""
    label: str = "y"
    """Name of the array that holds each sample's class, for the splits by label."""
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of each phone's samples that it evaluates on instead of training."""
    share: str = ""
    """What each phone tells of its data where it is asked, as ``labels,features``."""
    seed: int = 0
    slots: Annotated[int, Meta(ge=0)] = 0
    """Phones that train at once; 0 is one for each core."""
    speed: tuple[float, float] = (1.0, 1.0)
    bandwidth: float = 0.0
    latency: float = 0.0
    availability: float = 1.0
    dropout: float = 0.0
    identities: str = ""
    """Folder with a folder for each phone, by its name: who it is, where the broker asks for certificates."""
    attempts: int = 5
    """Connections that may fail in a row before the fleet gives up; 0 tries for ever."""


class FleetReport(msgspec.Struct, frozen=True):
    """What a fleet's transports have counted, in bytes, and what the process needed."""

    clients: int
    sent: int
    received: int
    dropped: int
    """Messages that phones dropped as malformed."""
    peak_rss_mib: float
    threads: int
    """Threads alive at the end: they do not grow with the number of phones."""


@dataclass
class SharedCopies:
    """The global model's versions that some phone of this process holds, each once, all but the newest at rest."""

    _models: dict[bytes, Model] = field(default_factory=dict)
    _holders: dict[bytes, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self, digest: bytes, layout: Layout) -> Model | None:
        """The copy with that digest."""
        del layout
        return self._models.get(digest)

    def save(self, digest: bytes, model: Model, replaces: bytes) -> None:
        """One phone more holds ``model``, one less what it replaces."""
        with self._lock:
            if digest not in self._models:
                self._models = {known: one.at_rest() for known, one in self._models.items()}
                self._models[digest] = model
            self._holders[digest] = self._holders.get(digest, 0) + 1
            left = self._holders.get(replaces, 0) - 1
            if left > 0:
                self._holders[replaces] = left
            elif replaces in self._holders:
                del self._holders[replaces]
                self._models.pop(replaces, None)


@dataclass
class Phone(Device):
    """A device with the processor, the radio and the habits of its profile."""

    profile: PhoneProfile = field(default_factory=PhoneProfile)
    _habits: random.Random = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._habits = random.Random(f"{self.seed}/habits")  # noqa: S311

    async def habits(self, period: float = 30.0) -> None:
        """Come and go: in each ``period`` seconds the phone may train with the probability of its availability."""
        while self.profile.availability < 1:
            self.available(self._habits.random() < self.profile.availability)
            await asyncio.sleep(period * self._habits.uniform(0.5, 1.5))

    async def _perform(self, work: Work) -> Finished | Failed:
        if self._habits.random() < self.profile.dropout:
            # The phone vanishes for a while: its last will goes out, and it comes back with what its store holds.
            await asyncio.sleep(self._habits.uniform(0.0, 1.0))
            self.link.drop()
            held = self.store.held()
            task = work.invitation
            return Failed(task.epoch, task.task, "dropped out", held.version, held.digest)
        loop = asyncio.get_running_loop()
        started = loop.time()
        answer = await super()._perform(self._in_machine_time(work))
        if self.profile.speed < 1:
            await asyncio.sleep(self.profile.training_seconds(loop.time() - started) - (loop.time() - started))
        return answer

    def _in_machine_time(self, work: Work) -> Work:
        """A bound in time is in the phone's own: a slow one gets fewer seconds of this machine."""
        plan = work.invitation.plan
        own = msgspec.structs.replace(plan, seconds=self.profile.machine_seconds(plan.seconds))
        return replace(work, invitation=msgspec.structs.replace(work.invitation, plan=own))


class Fleet:
    """All phones of one process.

    Raises:
        DataError: the data cannot be read, or cannot be split as asked.
        ConfigError: a profile's value is out of range.
    """

    def __init__(self, spec: FleetSpec, log: Callable[[str], None]) -> None:
        self.spec = spec
        arrays, rows = _split(spec)
        self._arrays = arrays
        self._fits: Manifest | None = None
        self._workshop = Workshop(spec.slots or os.cpu_count() or 1)
        self._copies = SharedCopies()
        profiles = draw_profiles(
            spec.clients,
            speed=spec.speed,
            bandwidth=spec.bandwidth,
            latency=spec.latency,
            availability=spec.availability,
            dropout=spec.dropout,
            seed=spec.seed,
        )
        address = Address.parse(spec.url)
        self.phones = [
            self._phone(number, address, profile, rows[number], log) for number, profile in enumerate(profiles)
        ]

    async def run(self) -> None:
        """Take part until the federation has finished.

        Raises:
            TransportError: the broker cannot be reached.
            DataError: the phones' data does not fit the federation's bundle.
        """
        lives = [asyncio.ensure_future(phone.run()) for phone in self.phones]
        habits = [asyncio.ensure_future(phone.habits()) for phone in self.phones]
        finished = asyncio.gather(*(phone.done.wait() for phone in self.phones))
        try:
            everything: list[asyncio.Future[Any]] = [finished, *lives]
            done, _ = await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            for life in lives:
                if life in done:
                    life.result()
        finally:
            finished.cancel()
            for task in habits:
                task.cancel()
            await asyncio.gather(*(phone.close() for phone in self.phones))
            await asyncio.gather(finished, *lives, *habits, return_exceptions=True)
            self._workshop.close()

    def report(self) -> FleetReport:
        """What the transports have counted so far."""
        traffic = [phone.link.traffic for phone in self.phones]
        return FleetReport(
            len(self.phones),
            sum(counted.sent for counted in traffic),
            sum(counted.received for counted in traffic),
            sum(phone.dropped for phone in self.phones),
            peak_rss_mib(),
            threading.active_count(),
        )

    def _phone(
        self, number: int, address: Address, profile: PhoneProfile, rows: Indices, log: Callable[[str], None]
    ) -> Phone:
        spec, name = self.spec, f"phone-{number:04d}"
        root = Path(spec.state)
        identity = Path(spec.identities) / name if spec.identities else None
        tls = None if identity is None else Tls.of(identity)
        voice, remember = _voice(identity, root / name)

        def connect(will: tuple[str, bytes]) -> Link:
            inner = MqttLink(address, f"fedge-{spec.federation}-{name}", will, spec.attempts, keepalive=60, tls=tls)
            return RadioLink(inner, profile)

        def open_data(manifest: Manifest) -> tuple[DataSource, DataSource]:
            source = ArraySource(self._fitting(manifest), rows)
            if spec.holdout and source.samples > 1:
                return split(source, spec.holdout, spec.seed + number)
            return source, source

        return Phone(
            client=name,
            federation=spec.federation,
            connect=connect,
            store=Store(root / name, durable=False, bundles=root / "bundles"),
            copies=self._copies,
            workshop=self._workshop,
            open_data=open_data,
            log=log,
            seed=spec.seed * 1_000_003 + number,
            software="emulated",
            uplink=profile.bandwidth,
            voice=voice,
            remember=remember,
            profile=profile,
            shares=sharing(spec.share),
        )

    def _fitting(self, manifest: Manifest) -> Arrays:
        """The arrays that the bundle names; checked once, not once a phone."""
        if manifest is not self._fits:
            check(self._arrays, manifest)
            self._fits = manifest
        return {feature.name: self._arrays[feature.name] for feature in (*manifest.inputs, *manifest.targets)}


def _voice(identity: Path | None, state: Path) -> tuple[Member, Callable[[Stamp, float], None]]:
    """How a phone speaks: it signs where it was enrolled, and not where it has a certificate alone."""
    if identity is None or not (identity / "federation.pub").exists():
        return PlainMember(), lambda _stamp, _issued: None
    from edge_client.trust.identity import Identity
    from edge_client.trust.speech import identity_voice

    return identity_voice(Identity.load(identity), state, time.time())


def peak_rss_mib() -> float:
    """The most memory that this process has held, in MiB."""
    try:
        # What getrusage gives begins with what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _split(spec: FleetSpec) -> tuple[Arrays, list[Indices]]:
    arrays = load_arrays(spec.data)
    labels = arrays.get(spec.label)
    if labels is None:
        if spec.split in ("dirichlet", "shards"):
            raise DataError(f"split {spec.split!r} needs the array {spec.label!r}; found {', '.join(sorted(arrays))}")
        labels = np.zeros(len(next(iter(arrays.values()))), np.int64)
    rows = partition(
        labels,
        spec.clients,
        spec.split,
        alpha=spec.alpha,
        shards=spec.shards,
        users=arrays.get(spec.key),
        seed=spec.seed,
    )
    return arrays, rows
