"""A new release of the client goes to the fleet in waves: a pure policy over what devices say of themselves.

A wave is asked, and watched until each of its members runs the release, has gone back from it, or says nothing any
more. Where too many of one wave failed, the rollout stops; else the next wave is asked. Whoever comes later, when all
that were there have it, is asked too.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Protocol

import msgspec

from edge_client.errors import ConfigError
from edge_client.trust.release import Record
from edge_client.wire.messages import Condition, Release

PRESENT = 1200.0
"""Seconds since a device was heard for which it counts as there: four heartbeats."""


class Seat(msgspec.Struct, frozen=True, array_like=True):
    """A device that is asked in a rollout."""

    wave: int
    state: Literal["asked", "taken", "healthy", "failed", "missed"]
    """Asked; it has begun; runs it; has not, and says or shows why; was asked and has not answered."""
    since: float
    """Seconds since 1970."""
    reason: str = ""


class Rollout(msgspec.Struct, frozen=True, array_like=True):
    """One rollout, and how far it is."""

    version: str
    release: Release
    waves: tuple[str, ...]
    """By the end of each, so many devices are asked: a number, or a share of all as ``10%``."""
    failing: float
    """Share of a wave that may fail, 0 to 1."""
    patience: float
    """Seconds after which a device that says nothing of it any more counts as failed."""
    state: Literal["running", "done", "stopped"] = "running"
    wave: int = 0
    reason: str = ""

    @property
    def name(self) -> bytes:
        """What devices call the release."""
        return hashlib.sha256(self.release.record).digest()[:8]

    @property
    def record(self) -> Record:
        """What the release is; it was signed here."""
        return msgspec.msgpack.decode(self.release.record, type=Record)


class Spoken(Protocol):
    """What a device has said, as far as it matters here."""

    @property
    def software(self) -> str:
        """The version of its client."""

    @property
    def condition(self) -> Condition:
        """How it is."""


class Known(Protocol):
    """A device, as far as it matters here."""

    @property
    def seen(self) -> float:
        """When it was heard last, seconds since 1970."""

    @property
    def said(self) -> Spoken | None:
        """What it said then."""

    @property
    def retired(self) -> float | None:
        """When it was retired."""


def waves(text: str) -> tuple[str, ...]:
    """Waves as an operator writes them: ``1,10%,100%``.

    Raises:
        ConfigError: they are none.
    """
    found = tuple(part.strip() for part in text.split(","))
    for part in found:
        number = re.fullmatch(r"([0-9]{1,7})(%?)", part)
        if number is None or not 0 < int(number[1]) <= (100 if number[2] else 10_000_000):
            raise ConfigError(f"--waves {text!r}: expected numbers of devices or shares of all, such as 1,10%,100%")
    return found


def wanted(wave: str, devices: int) -> int:
    """How many devices are asked by the end of a wave."""
    return math.ceil(int(wave[:-1]) / 100 * devices) if wave.endswith("%") else min(int(wave), devices)


def step(
    rollout: Rollout,
    seats: Mapping[str, Seat],
    devices: Mapping[str, Known],
    now: float,
    fits: Callable[[str], bool],
) -> tuple[Rollout, dict[str, Seat]]:
    """How far it is at ``now`` (seconds since 1970), and the seats that have changed: who is ``asked`` there is to be.

    ``fits`` says whether the release fits a platform.
    """
    changed = dict(_heard(rollout, seats, devices, now))
    all_seats = {**seats, **changed}
    if rollout.state == "stopped":
        return rollout, changed
    open_ = {
        client
        for client, device in devices.items()
        if _eligible(rollout, device, fits) and _free(rollout, all_seats.get(client))
    }
    if not open_ and all(seat.state == "missed" for seat in all_seats.values()):
        # There is nobody else: without them it would neither go on nor end.
        open_ = {client for client in all_seats if client in devices and _eligible(rollout, devices[client], fits)}
    while True:
        members = [seat for seat in all_seats.values() if seat.wave == rollout.wave and seat.state != "missed"]
        failed = [seat for seat in members if seat.state == "failed"]
        if failed and len(failed) > rollout.failing * len(members):
            reason = f"{len(failed)} of {len(members)} in wave {rollout.wave + 1} failed: {failed[-1].reason}"
            return msgspec.structs.replace(rollout, state="stopped", reason=reason), changed
        seated = sum(seat.state != "missed" for seat in all_seats.values())
        room = wanted(rollout.waves[rollout.wave], seated + len(open_)) - seated
        present = [client for client in open_ if now - devices[client].seen < PRESENT]
        present.sort(key=lambda client: hashlib.sha256(rollout.name + client.encode()).digest())
        chosen = present[: max(0, room)]
        for client in chosen:
            all_seats[client] = changed[client] = Seat(rollout.wave, "asked", now)
        open_.difference_update(chosen)
        if chosen or not seated or any(seat.state in ("asked", "taken") for seat in members):
            return rollout, changed
        if rollout.wave + 1 == len(rollout.waves):
            return msgspec.structs.replace(rollout, state="done"), changed
        rollout = msgspec.structs.replace(rollout, wave=rollout.wave + 1)


def _heard(
    rollout: Rollout, seats: Mapping[str, Seat], devices: Mapping[str, Known], now: float
) -> Iterator[tuple[str, Seat]]:
    """What seats are now, where they are something else than before."""
    for client, seat in seats.items():
        device = devices.get(client)
        found = _state(rollout, seat, device, now)
        if (found.state, found.reason) != (seat.state, seat.reason):
            yield client, found


def _state(rollout: Rollout, seat: Seat, device: Known | None, now: float) -> Seat:
    """What a seat is now."""
    said = None if device is None else device.said
    progress = None if said is None else said.condition.progress
    if progress is not None and progress.release != rollout.name:
        progress = None
    stage = "" if progress is None else progress.stage
    if said is not None and said.software == rollout.version and stage in ("", "healthy"):
        return msgspec.structs.replace(seat, state="healthy", since=now, reason="")
    if progress is not None and stage in ("refused", "back"):
        return msgspec.structs.replace(seat, state="failed", since=now, reason=progress.detail)
    if stage and seat.state in ("asked", "taken") and seat.reason != stage:
        return msgspec.structs.replace(seat, state="taken", since=now, reason=stage)
    # One that fetches for long over a slow link says so with each heartbeat.
    last = seat.since if device is None or stage != "fetching" else max(seat.since, device.seen)
    if seat.state == "asked" and now - last > rollout.patience:
        return msgspec.structs.replace(seat, state="missed", since=now, reason="it was asked and has not answered")
    if seat.state == "taken" and now - last > rollout.patience:
        reason = f"nothing new for {rollout.patience / 60:.0f} min, it was {seat.reason}"
        return msgspec.structs.replace(seat, state="failed", since=now, reason=reason)
    return seat


def _free(rollout: Rollout, seat: Seat | None) -> bool:
    """Whether a device may be asked: one that has not answered waits for a later wave, or for the end."""
    return seat is None or (seat.state == "missed" and (seat.wave < rollout.wave or rollout.state == "done"))


def _eligible(rollout: Rollout, device: Known, fits: Callable[[str], bool]) -> bool:
    said = device.said
    return (
        said is not None
        and device.retired is None
        and said.software != rollout.version
        and bool(said.condition.platform)
        and fits(said.condition.platform)
    )
