"""When a device may train: a pure policy over what its board tells, with hysteresis so that it does not flutter."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from edge_client.errors import ConfigError
from edge_client.service.board import Readings, matches

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)\Z")
_DAY = 24 * 60


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When to train. What a board does not tell forbids nothing, except the time where ``hours`` are given."""

    hottest: float = 75.0
    """Degrees Celsius from which training rests, until it is ``cooling`` degrees colder. A Pi slows down at 80."""
    cooling: float = 10.0
    others: float = 0.5
    """Share of the processors' time that other programs may use, 0 to 1; training goes on below half of that."""
    memory_mib: int = 48
    """MiB of memory that must be free."""
    hours: tuple[str, ...] = ()
    """Times of day to train at, such as ``"22:00-06:00"``, in local time; none is always."""
    metered: tuple[str, ...] = ("wwan*", "ppp*", "rmnet*")
    """Network interfaces that cost money: nothing is trained while the default route takes one."""
    battery: float = 101.0
    """Percent of charge from which a device on battery trains too; over 100 is never."""
    supply: bool = True
    """Whether a Raspberry Pi must not train while it says that its supply is too weak."""
    settle: float = 60.0
    """Seconds for which nothing must speak against training before it goes on."""


ALWAYS = Rules(hottest=150.0, others=1.0, memory_mib=0, metered=(), battery=0.0, supply=False, settle=0.0)
"""For a client that nobody has given rules."""


@dataclass(frozen=True)
class Verdict:
    """Whether the device may train, and what speaks against it; ``kinds`` are the reasons without their numbers."""

    allowed: bool
    reasons: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.allowed:
            return "may train"
        return "does not train: " + (", ".join(self.reasons) or "waits for things to settle")


@dataclass
class Gate:
    """Decides from readings; it keeps what it decided before.

    Raises:
        ConfigError: a rule is out of range.
    """

    rules: Rules
    _tripped: set[str] = field(default_factory=set)
    _clear_since: float | None = None
    _allowed: bool = True
    """A device that starts does not wait for things to settle."""

    def __post_init__(self) -> None:
        rules = self.rules
        for name, value, low, high in (
            ("hottest", rules.hottest, 0, 150),
            ("cooling", rules.cooling, 0, 100),
            ("others", rules.others, 0, 1),
            ("battery", rules.battery, 0, 101),
            ("settle", rules.settle, 0, 86_400),
        ):
            if not low <= value <= high:
                raise ConfigError(f"[training] {name} = {value}: expected {low} to {high}")
        for hours in rules.hours:
            window(hours)

    def decide(self, readings: Readings, now: float) -> Verdict:
        """Whether to train, given ``readings`` at monotonic time ``now`` (seconds)."""
        found = tuple(self._reasons(readings))
        kinds, reasons = tuple(kind for kind, _ in found), tuple(reason for _, reason in found)
        if reasons:
            self._allowed, self._clear_since = False, None
        elif not self._allowed:
            self._clear_since = now if self._clear_since is None else self._clear_since
            self._allowed = now - self._clear_since >= self.rules.settle
        return Verdict(self._allowed, reasons, kinds)

    def _reasons(self, found: Readings) -> Iterator[tuple[str, str]]:
        rules = self.rules
        if found.degrees is not None and self._over("hot", found.degrees, rules.hottest, rules.hottest - rules.cooling):
            yield "hot", f"{found.degrees:.0f} degrees (at most {rules.hottest:.0f})"
        if found.others is not None and self._over(
            "busy", found.others, rules.others, rules.others / 2, inclusive=False
        ):
            yield "busy", f"other programs use {found.others:.0%} of the processors (at most {rules.others:.0%})"
        least = rules.memory_mib << 20
        if found.free is not None and self._over("memory", -found.free, -least, -least * 1.25):
            yield "memory", f"{found.free >> 20} MiB of memory free (at least {rules.memory_mib})"
        if found.undervoltage and rules.supply:
            yield "supply", "the power supply is too weak"
        if rules.hours and found.minute is None:
            yield "clock", "the clock cannot be right, and there are hours to keep"
        elif rules.hours and not any(_within(found.minute, window(hours)) for hours in rules.hours):
            yield "hours", f"not within {' or '.join(rules.hours)}"
        if found.interface and matches(found.interface, rules.metered):
            yield "metered", f"the network is metered ({found.interface})"
        if found.on_battery:
            charge = 0.0 if found.battery is None else found.battery
            # Training on battery empties it: it goes on with a little more than it stopped at.
            if self._over("battery", -charge, -rules.battery, -min(100.0, rules.battery + 5), inclusive=False):
                yield "battery", f"on battery, at {charge:.0f} %"
        else:
            self._tripped.discard("battery")

    def _over(self, name: str, value: float, limit: float, calm: float, *, inclusive: bool = True) -> bool:
        """Whether a value is over its limit, or was and has not come down to ``calm`` yet."""
        over = value >= limit if inclusive else value > limit
        if over:
            self._tripped.add(name)
        elif value <= calm:
            self._tripped.discard(name)
        return name in self._tripped


def window(hours: str) -> tuple[int, int]:
    """The minutes of the day at which a time window begins and ends; it may go over midnight.

    Raises:
        ConfigError: it is none.
    """
    found = _HOURS.match(hours)
    if found is None:
        raise ConfigError(f"[training] hours {hours!r}: expected a window such as 22:00-06:00")
    a, b, c, d = (int(part) for part in found.groups())
    if (c, d) > (24, 0):
        raise ConfigError(f"[training] hours {hours!r}: a day ends at 24:00")
    return a * 60 + b, c * 60 + d


def _within(minute: int | None, hours: tuple[int, int]) -> bool:
    begin, end = hours
    at = 0 if minute is None else minute % _DAY
    return begin <= at < end if begin < end else at >= begin or at < end
