"""What systemd is told by a service of ``Type=notify``: sd_notify(3), in a few lines.

https://www.freedesktop.org/software/systemd/man/sd_notify.html
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock
from time import monotonic


class Notifier:
    """Sends to the socket that the environment names; without one it says nothing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        given = environment.get("WATCHDOG_USEC", "")
        self.watchdog = int(given) / 1e6 if given.isdigit() and int(given) > 0 else None
        """Seconds within which systemd wants to hear of life; None where it does not watch."""

    def tell(self, **state: str | int) -> None:
        """Send assignments, such as ``READY=1``; a line each. What cannot be sent is lost."""
        if self._address[:1] not in ("/", "@"):
            return
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        lines = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in state.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # A full queue must not stop the client.
            sock.setblocking(False)
            sock.sendto(lines.encode(), path)


@dataclass
class Pulse:
    """The worker's: it beats at every step, and pauses between two where the device may not train."""

    _lock: Lock = field(default_factory=Lock)
    _jobs: int = 0
    _last: float = 0.0
    _go: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self._go.set()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A job is under way."""
        with self._lock:
            self._jobs += 1
            self._last = monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._jobs -= 1

    def beat(self, stop: Event, patience: float = 1.0) -> bool:
        """A step is due: wait while training is paused; whether to stop instead. Asks every ``patience`` seconds."""
        self._last = monotonic()
        while not stop.is_set() and not self._go.wait(patience):
            self._last = monotonic()
        return stop.is_set()

    def pause(self, paused: bool) -> None:
        """Pause before the next step, or go on."""
        if paused:
            self._go.clear()
        else:
            self._go.set()

    def silent(self) -> float:
        """Seconds since the last beat of a job under way; 0 where there is none."""
        with self._lock:
            return monotonic() - self._last if self._jobs else 0.0
