"""What a board tells about itself, read from ``/proc`` and ``/sys``: all of it may be missing."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from edge_client.feeds.drop import BELIEVABLE


@dataclass(frozen=True)
class Readings:
    """The state of a device at a moment; None is not known."""

    degrees: float | None = None
    """The hottest sensor, in degrees Celsius."""
    others: float | None = None
    """Share of the processors' time that other programs used since the last reading, 0 to 1."""
    free: int | None = None
    """Bytes of memory that may still be had."""
    minute: int | None = None
    """Minute of the day, local time; None where the clock cannot be right."""
    interface: str = ""
    """The network interface that the default route takes; empty without a network."""
    on_battery: bool | None = None
    battery: float | None = None
    """Charge of the fullest battery, in percent."""
    undervoltage: bool = False
    """Whether a Raspberry Pi says now that its supply is too weak."""
    watts: float | None = None
    """What the board takes, where it measures that."""


class Board:
    """Reads a device. ``root`` is where ``proc`` and ``sys`` are."""

    def __init__(self, root: Path = Path("/"), *, wall: Callable[[], float] = time.time) -> None:
        self._proc, self._sys = root / "proc", root / "sys"
        self._wall = wall
        self._last: tuple[int, int, int] | None = None

    def read(self) -> Readings:
        """How things are now."""
        on_battery, battery = self._supply()
        return Readings(
            degrees=self.degrees(),
            others=self._others(),
            free=self._free(),
            minute=self._minute(),
            interface=self._interface(),
            on_battery=on_battery,
            battery=battery,
            undervoltage=self._undervoltage(),
            watts=self.watts(),
        )

    def degrees(self) -> float | None:
        """The hottest sensor, in degrees Celsius."""
        found = [value / 1000 for value in self._numbers("class/thermal/thermal_zone*/temp")]
        return max(found, default=None)

    def watts(self) -> float | None:
        """Power that supplies or a sensor of the board report (``power1_input`` of hwmon, ``power_now``)."""
        found = sum(self._numbers("class/hwmon/hwmon*/power1_input")) or sum(
            self._numbers("class/power_supply/*/power_now")
        )
        return abs(found) / 1e6 or None

    def model(self) -> str:
        """The board's name, as its device tree has it."""
        with contextlib.suppress(OSError):
            return (self._proc / "device-tree" / "model").read_text(encoding="ascii", errors="replace").strip("\0 \n")
        return ""

    def _others(self) -> float | None:
        try:
            fields = [int(part) for part in self._text(self._proc / "stat").splitlines()[0].split()[1:9]]
            own = self._text(self._proc / "self" / "stat").rpartition(")")[2].split()
            mine = int(own[11]) + int(own[12])
        except (OSError, ValueError, IndexError):
            return None
        now = (sum(fields), sum(fields) - fields[3] - fields[4], mine)
        last, self._last = self._last, now
        if last is None or now[0] <= last[0]:
            return None
        total, busy, own_time = (after - before for after, before in zip(now, last, strict=True))
        return min(1.0, max(0.0, (busy - own_time) / total))

    def _free(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in self._text(self._proc / "meminfo").splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return None

    def _minute(self) -> int | None:
        now = self._wall()
        if now < BELIEVABLE:
            return None
        local = time.localtime(now)
        return local.tm_hour * 60 + local.tm_min

    def _interface(self) -> str:
        with contextlib.suppress(OSError):
            routes = [line.split() for line in self._text(self._proc / "net" / "route").splitlines()[1:]]
            default = [route for route in routes if len(route) > 7 and route[1] == route[7] == "00000000"]
            if default:
                return min(default, key=lambda route: int(route[6]))[0]
        return ""

    def _supply(self) -> tuple[bool | None, float | None]:
        online, discharging, charges = [], [], []
        for folder in sorted((self._sys / "class" / "power_supply").glob("*")):
            with contextlib.suppress(OSError, ValueError):
                if self._text(folder / "type").strip() == "Battery":
                    discharging.append(self._text(folder / "status").strip() == "Discharging")
                    charges.append(float(self._text(folder / "capacity")))
                else:
                    online.append(self._text(folder / "online").strip() == "1")
        if any(online) or not discharging:
            # A board without a battery that is running is on mains, whether it can tell or not.
            return (False if online or discharging else None), max(charges, default=None)
        return any(discharging), max(charges, default=None)

    def _undervoltage(self) -> bool:
        for folder in (self._sys / "class" / "hwmon").glob("hwmon*"):
            with contextlib.suppress(OSError):
                if self._text(folder / "name").strip() == "rpi_volt":
                    return self._text(folder / "in0_lcrit_alarm").strip() == "1"
        return False

    def _numbers(self, pattern: str) -> Iterator[int]:
        for path in sorted(self._sys.glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                yield int(self._text(path))

    def _text(self, path: Path) -> str:
        return path.read_text(encoding="ascii", errors="replace")


def matches(interface: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns, such as ``wwan*``, stands for the interface."""
    return any(fnmatch(interface, pattern) for pattern in patterns)


def resident() -> int:
    """Bytes of memory that this process has, at its peak; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def free_disk(folder: Path) -> int:
    """Bytes free on the medium of ``folder``."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
