"""What a client writes to its medium: SD cards wear out, so it is counted, in blocks as the medium takes them."""

import threading
import time
from collections.abc import Callable

_BLOCK = 4096
_DAY = 86_400.0


class Wear:
    """Counts writes; several threads may. It counts from the start of the client, and remembers nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = self._day_began = clock()
        self._total = self._today = 0
        self._lock = threading.Lock()

    def wrote(self, count: int) -> None:
        """A file of ``count`` bytes, or that many more of one, was written."""
        blocks = -(-count // _BLOCK) * _BLOCK
        with self._lock:
            self._total += blocks
            self._today += blocks

    @property
    def total(self) -> int:
        """Bytes since the client started."""
        return self._total

    def day(self) -> int | None:
        """Bytes of the day that is over, once a day; None until it is."""
        with self._lock:
            now = self._clock()
            if now - self._day_began < _DAY:
                return None
            found, self._today, self._day_began = self._today, 0, now
            return found

    def __str__(self) -> str:
        return f"{self._total / 2**20:,.1f} MiB written"
