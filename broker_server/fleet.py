"""Looks after a fleet while the server runs: remembers devices, has them pause, and brings new releases to them.

The operator's commands write to the same file (`broker_server.inventory`), whether a server runs or not; this notices.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from broker_server import events as e
from broker_server.inventory import Device, Inventory, Said
from broker_server.rollout import Rollout, Seat, step
from edge_client.errors import FedgeError, WireError
from edge_client.terminal import printable
from edge_client.trust.release import Record, fitting
from edge_client.wire.messages import BlobRef, Hello

RELEASES = "releases"
"""The folder in a federation's state with the files of releases, by their SHA-256."""
_WATCH = 1.0
"""Seconds between looks at what the operator wants."""
_GROUP = 30.0
"""Seconds for which what devices say is gathered before it is written."""
_AGAIN = 60.0
"""Seconds to wait after an error."""
_STEP = 10.0
"""Seconds between looks at a rollout about which nobody has said anything."""
_MOST = 100_000
"""Devices that are remembered: where nobody has to be enrolled, names can be made up."""

Result = TypeVar("Result")


@dataclass
class FleetCare:
    """The care for one federation's fleet, on the server's event loop.

    ``state`` is the federation's state folder, ``wall`` the time in seconds since 1970.
    """

    state: Path
    log: Callable[[str], None]
    wall: Callable[[], float]
    watch: float = _WATCH
    _feed: Callable[[e.Event], None] = field(init=False)
    _chunk: int = field(init=False)
    _pool: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(1, "fleet"))
    _inventory: Inventory = field(init=False)
    _open: bool = field(init=False, default=False)
    _devices: dict[str, Device] = field(init=False, default_factory=dict)
    _unwritten: dict[str, tuple[float, Said]] = field(init=False, default_factory=dict)
    _revision: int | None = field(init=False, default=None)
    _steered: e.Steered | None = field(init=False, default=None)
    _number: int = field(init=False, default=0)
    _rollout: Rollout | None = field(init=False, default=None)
    _record: Record | None = field(init=False, default=None)
    _seats: dict[str, Seat] = field(init=False, default_factory=dict)
    _news: bool = field(init=False, default=False)
    _written: float = field(init=False, default=0.0)
    _stepped: float = field(init=False, default=0.0)
    _step: "asyncio.Future[None] | None" = field(init=False, default=None)
    """What goes on with the rollout, to its end also where the server ends meanwhile."""
    _closing: bool = field(init=False, default=False)

    async def start(self, feed: Callable[[e.Event], None], chunk: int) -> None:
        """Open the file, and tell the coordinator who pauses; ``feed`` hands it an event.

        ``chunk`` is how many bytes of a blob the broker takes at once.

        Raises:
            LedgerError: the file cannot be used.
        """
        self._feed, self._chunk = feed, chunk
        self._inventory = await self._there(lambda: Inventory.open(self.state))
        self._open = True
        await self._refresh()

    def seen(self, client: str, hello: Hello) -> None:
        """A device has said how it is."""
        if client not in self._devices and len(self._devices) >= _MOST:
            return
        said, now = Said.of(hello), self.wall()
        before = self._devices.get(client, Device(client, 0.0, None))
        self._devices[client] = before._replace(seen=now, said=said)
        self._unwritten[client] = now, said
        self._news = self._news or before.said != said
        seat = self._seats.get(client)
        if seat is not None and (seat.state == "asked" or (seat.state == "taken" and self._forgotten(said))):
            # It may not have heard: brokers lose messages, and it may have been somewhere else.
            self._ask(client)

    async def run(self) -> None:
        """Look after them until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._refresh()
                if self._news or loop.time() - self._stepped >= _STEP:
                    self._news, self._stepped = False, loop.time()
                    self._step = asyncio.ensure_future(self._advance())
                    # Cut off in between, it would be on the disk, and nobody would ever have been told.
                    await asyncio.shield(self._step)
                if self._unwritten and loop.time() - self._written >= _GROUP:
                    self._written = loop.time()
                    await self._write()
            except FedgeError as error:
                # Training goes on without it.
                self.log(f"the fleet is not looked after for {_AGAIN:.0f} s: {error}")
                await asyncio.sleep(_AGAIN)
            await asyncio.sleep(self.watch)

    async def close(self) -> None:
        """Write what is not written yet, and let the file go."""
        self._closing = True
        if self._step is not None:
            await asyncio.gather(self._step, return_exceptions=True)
        try:
            if self._open:
                await self._write()
                await self._there(self._inventory.close)
        except FedgeError as error:
            self.log(str(error))
        self._pool.shutdown()

    async def _write(self) -> None:
        unwritten, self._unwritten = self._unwritten, {}
        if unwritten:
            await self._there(lambda: self._inventory.saw(unwritten))

    async def _refresh(self) -> None:
        """Read what the operator has changed, if that."""
        revision = await self._there(self._inventory.revision)
        if revision == self._revision:
            return
        self._revision = revision
        devices, everyone, latest = await self._there(self._read)
        for client, device in devices.items():
            known = self._devices.get(client)
            newer = known is not None and known.seen >= device.seen
            self._devices[client] = device._replace(seen=known.seen, said=known.said) if known and newer else device
        if latest is None:
            self._rollout = None
        elif latest[0] != self._number or latest[1].state == "stopped":
            self._number, self._rollout, self._seats = latest
            self._record = self._rollout.record
            self._news = True
            largest = max(file.blob.chunk for file in self._record.files)
            if largest > self._chunk and self._rollout.state == "running":
                reason = f"cut into {largest} bytes, and the broker takes {self._chunk}; set transfer.chunk to that"
                await self._stop(self._rollout, reason)
        self._steer(everyone)

    def _read(self) -> tuple[dict[str, Device], bool, tuple[int, Rollout, dict[str, Seat]] | None]:
        with self._inventory.group():
            latest = self._inventory.latest()
            found = None if latest is None else (*latest, self._inventory.seats(latest[0]))
            return self._inventory.devices(), self._inventory.everyone, found

    def _steer(self, everyone: bool) -> None:
        paused = frozenset(one.client for one in self._devices.values() if one.paused or one.retired is not None)
        files: tuple[tuple[BlobRef, str], ...] = ()
        if self._record is not None and self._rollout is not None and self._rollout.state != "stopped":
            folder = self.state / RELEASES
            files = tuple((file.blob, str(folder / file.blob.sha256.hex())) for file in self._record.files)
        steered = e.Steered(paused, everyone, files)
        if steered != self._steered:
            self._steered = steered
            self._feed(steered)

    async def _advance(self) -> None:
        if self._rollout is None:
            return
        before, now = self._rollout, self.wall()
        after, changed = step(before, self._seats, self._devices, now, self._fits)
        if after == before and not changed:
            return
        number = self._number
        # On the disk before anybody is asked: a server that forgets whom it has asked would ask too many.
        await self._there(lambda: self._inventory.keep(number, after, changed))
        self._rollout, self._seats = after, self._seats | changed
        await self._write()
        self._tell(before, after, changed)
        for client, seat in changed.items():
            if seat.state == "asked":
                self._ask(client)
        if after.state == "stopped" and not self._closing:
            self._steer(bool(self._steered and self._steered.everyone))

    def _tell(self, before: Rollout, after: Rollout, changed: Mapping[str, Seat]) -> None:
        """Say what is new, in the order in which it came to be."""
        lines = {
            client: f"{client} {_SHOWN[seat.state]}{': ' if seat.reason else ''}{printable(seat.reason)}"
            for client, seat in sorted(changed.items())
        }
        asked = [lines[client] for client in lines if changed[client].state == "asked"]
        said = [line for line in lines.values() if line not in asked]
        if (after.state, after.wave) != (before.state, before.wave):
            where = f"wave {after.wave + 1} of {len(after.waves)}" if after.state == "running" else after.state
            said.append(f"{where}{': ' if after.reason else ''}{printable(after.reason)}")
        for line in (*said, *asked):
            self.log(f"release {after.version}: {line}")

    async def _stop(self, rollout: Rollout, reason: str) -> None:
        self._rollout, number = msgspec.structs.replace(rollout, state="stopped", reason=reason), self._number
        self.log(f"release {rollout.version}: stopped: {reason}")
        stopped = self._rollout
        await self._there(lambda: self._inventory.keep(number, stopped))

    def _ask(self, client: str) -> None:
        # A server that ends says nothing any more; the next one asks with the device's hello.
        if self._rollout is not None and self._rollout.state != "stopped" and not self._closing:
            self._feed(e.Say(client, self._rollout.release))

    def _forgotten(self, said: Said) -> bool:
        """Whether a device that has begun knows nothing of it any more: it was started anew while it fetched."""
        progress, rollout = said.condition.progress, self._rollout
        begun = rollout is not None and progress is not None and progress.release == rollout.name
        return rollout is not None and said.software != rollout.version and not begun

    def _fits(self, platform: str) -> bool:
        try:
            return self._record is not None and bool(fitting(self._record.files, platform))
        except WireError:
            return False

    async def _there(self, job: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, job)


_SHOWN = {
    "asked": "is asked",
    "taken": "has begun",
    "healthy": "runs it",
    "failed": "does not run it",
    "missed": "was not reached",
}
