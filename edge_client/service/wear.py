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
        self._last: int | None = None
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

    def rate(self) -> int:
        """Bytes that it writes in a day: of the last one, and before that is over as many as from the start on."""
        with self._lock:
            return self._today if self._last is None else self._last

    def day(self) -> int | None:
        """Bytes of the day that is over, once a day; None until it is."""
        with self._lock:
            now = self._clock()
            if now - self._day_began < _DAY:
                return None
            self._last, self._today, self._day_began = self._today, 0, now
            return self._last

    def __str__(self) -> str:
        return f"{self._total / 2**20:,.1f} MiB written"
