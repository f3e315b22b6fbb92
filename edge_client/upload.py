"""An update on its way up: announced until there is a receipt, its chunks sent as the server grants them. No I/O."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from edge_client.wire import transfer
from edge_client.wire.messages import BlobRef


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server that does not answer: ``first`` seconds, doubled each time, up to ``longest``.

    Up to a quarter less, at random, so that a fleet that was left waiting does not speak as one.
    """

    first: float
    longest: float
    rng: random.Random

    def after(self, attempts: int) -> float:
        """Seconds to wait after so many attempts."""
        return min(self.longest, self.first * 2.0 ** min(attempts, 16)) * self.rng.uniform(0.75, 1.0)


@dataclass(frozen=True)
class Pending:
    """An update that is stored and has no receipt yet."""

    epoch: int
    task: int
    update: bytes


@dataclass
class Announcement:
    """One update without a receipt.

    ``patience``: how long it waits for an answer before it is announced again. ``at``: when that is due; not before the
    server is known to be there, so infinity at first.
    """

    pending: Pending
    ref: BlobRef
    patience: Patience
    at: float = math.inf
    _attempts: int = 0
    _said: float = -math.inf
    """When it was announced last on this connection, or its chunks were asked for."""
    _granted: float | None = None
    """When the first chunks were; for ever ago where the connection has been lost since, and the time says nothing."""

    @property
    def identity(self) -> tuple[int, int]:
        """Epoch and task."""
        return self.pending.epoch, self.pending.task

    @property
    def coming(self) -> int:
        """Bytes of the update that the transport has not counted yet."""
        return 0 if self._granted is not None else self.ref.size

    def speed(self, now: float) -> float:
        """Bytes a second from the first grant to the receipt, which is ``now``; 0 where that says nothing.

        Only of chunks, because what travels in one message takes the time of an answer and not that of its bytes.
        """
        if self._granted is None or now <= self._granted:
            return 0.0
        return self.ref.size / (now - self._granted)

    def interrupt(self) -> None:
        """The connection is lost: it is announced again when the server is known to be there."""
        self.at, self._said = math.inf, -math.inf
        if self._granted is not None:
            self._granted = -math.inf

    def remind(self, now: float) -> None:
        """The server asks for it: announce it now, unless that was done a moment ago and the two have crossed.

        Chunks that are under way would be granted again, and sent twice.
        """
        if self.ref.inline is not None or now - self._said >= self.patience.first:
            self.at = now

    def due(self, now: float) -> bool:
        """Whether to announce it now; the next time is then set."""
        if now < self.at:
            return False
        self._attempts += 1
        self._said = now
        self.at = now + self.patience.after(self._attempts)
        return True

    def pieces(self, indices: tuple[int, ...], now: float) -> Iterator[tuple[int, bytes]]:
        """The granted chunks, each once; the server is there, so patience starts anew."""
        self._attempts, self._said = 0, now
        self._granted = now if self._granted is None else self._granted
        self.at = now + self.patience.after(1)
        for index in dict.fromkeys(indices):
            if index < transfer.count(self.ref):
                yield index, transfer.piece(self.pending.update, self.ref, index)


def announce(pending: Pending, chunk: int, inline: int, patience: Patience) -> Announcement:
    """The announcement of an update: in chunks of ``chunk`` bytes, or whole where it has at most ``inline``."""
    return Announcement(pending, transfer.refer(pending.update, chunk=chunk, inline=inline), patience)
