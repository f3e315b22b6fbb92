"""Looks after a client that runs as a service: its data, whether it may train, what systemd hears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from edge_client.device import Device
from edge_client.errors import StoreError
from edge_client.feeds.opening import Feeds
from edge_client.service.board import Board, Readings, free_disk
from edge_client.service.gate import Gate, Verdict
from edge_client.service.notify import Notifier
from edge_client.service.wear import Wear
from edge_client.terminal import printable
from edge_client.wire.messages import Condition, Progress

_GLANCE = 10.0
"""Seconds between two looks at board and data."""


@dataclass
class Attendant:
    """One device's; runs on its event loop."""

    device: Device
    feeds: Feeds
    gate: Gate
    board: Board
    notifier: Notifier
    log: Callable[[str], None]
    stall: float
    wear: Wear
    glance: float = _GLANCE
    _progress: Progress | None = field(init=False, default=None)
    """What the server knows of the release under way."""
    _readings: Readings = field(init=False, default_factory=Readings)
    _said: Verdict | None = field(init=False, default=None)
    _told: tuple[bool, int | None] | None = field(init=False, default=None)
    _hangs: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.device.condition = self.condition

    @asynccontextmanager
    async def attending(self) -> AsyncIterator[None]:
        """Look after the device for as long as it runs."""
        self.notifier.tell(READY=1, STATUS="joined")
        tasks = [asyncio.ensure_future(self._look()), asyncio.ensure_future(self._watch())]
        try:
            yield
        finally:
            self.notifier.tell(STOPPING=1)
            for task in tasks:
                task.cancel()
            self._shelve(now=True)
            # A paused task would not see that the client ends.
            self.device.pulse.pause(False)
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Say that loop and worker live: the one by running this, the other by its steps."""
        while self.notifier.watchdog is not None:
            if self.alive():
                self.notifier.tell(WATCHDOG=1)
            await asyncio.sleep(min(self.notifier.watchdog / 3, 30.0))

    def alive(self) -> bool:
        """Whether the worker takes steps where it should."""
        silent = self.device.pulse.silent()
        hangs = silent > self.stall
        if hangs and not self._hangs:
            self.log(f"{self.device.client}: no training step for {silent:.0f} s; leaving it to the watchdog")
        self._hangs = hangs
        return not hangs

    async def _look(self) -> None:
        try:
            await self._glances()
        except Exception as error:
            self.device.fail(error)

    async def _glances(self) -> None:
        while True:
            await asyncio.to_thread(self.feeds.refresh)
            await asyncio.to_thread(self._shelve)
            readings = await asyncio.to_thread(self.board.read)
            self.judge(readings, asyncio.get_running_loop().time())
            self._follow()
            if (written := self.wear.day()) is not None:
                self.log(f"{self.device.client}: {written / 2**20:,.1f} MiB written to the disk in a day")
            await asyncio.sleep(self.glance)

    def _follow(self) -> None:
        """See how far a new release of the client is, and have the server told of what is new."""
        updater = self.device.updater
        if updater is None:
            return
        self.device.pull()
        updater.look(joined=self.device.greeted)
        if self.device.greeted and updater.progress != self._progress:
            self.device.available(self._said is None or self._said.allowed)

    def condition(self) -> Condition:
        """How the device is now."""
        said, found, updater = self._said, self._readings, self.device.updater
        able = updater is not None and updater.able
        self._progress = None if updater is None else updater.progress
        return Condition(
            degrees=found.degrees,
            disk=free_disk(self.device.store.folder),
            memory=found.free,
            written=self.wear.rate(),
            rests="" if said is None or said.allowed else printable(str(said).removeprefix("does not train: "))[:500],
            platform=updater.platform if updater is not None and able else "",
            progress=self._progress,
        )

    def _shelve(self, *, now: bool = False) -> None:
        """Have the newest model written that waits for it."""
        if self.device.shelf is not None:
            try:
                self.device.shelf.catch_up(now=now)
            except StoreError as error:
                self.log(f"{self.device.client}: {error}")

    def judge(self, readings: Readings, now: float) -> None:
        """Tell the client whether it may train and on how many samples, where that has changed."""
        verdict, samples = self.gate.decide(readings, now), self.feeds.samples
        if samples == 0:
            verdict = Verdict(False, (*verdict.reasons, "no samples yet"), (*verdict.kinds, "samples"))
        before = (True, ()) if self._said is None else (self._said.allowed, self._said.kinds)
        if (verdict.allowed, verdict.kinds) != before:
            self.log(f"{self.device.client}: {verdict}")
        self._said, self._readings = verdict, readings
        self.device.pulse.pause(not verdict.allowed)
        if self._worth_telling(verdict.allowed, samples):
            self._told = verdict.allowed, samples
            self.device.available(verdict.allowed, samples)
        heat = "" if readings.degrees is None else f", {readings.degrees:.0f} degrees"
        count = "" if samples is None else f", {samples} samples"
        self.notifier.tell(STATUS=f"{verdict}{count}{heat}, {self.wear}")

    def _worth_telling(self, allowed: bool, samples: int | None) -> bool:
        """Whether the server should hear of it: a tenth more or fewer samples change little."""
        told_allowed, told_samples = self._told or (True, self.feeds.opened)
        if allowed != told_allowed or (samples is None) != (told_samples is None):
            return True
        return samples is not None and abs(samples - (told_samples or 0)) > 0.1 * (told_samples or 0)
