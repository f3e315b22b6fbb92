"""Updates on their way up: announced until there is a receipt, their chunks sent as the server grants them. No I/O."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_client.wire import transfer
from edge_client.wire.messages import BlobRef, Traffic, Upload


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


@dataclass
class Outbox:
    """What a client has to send: at most one update, as the next task begins only once the last has its receipt.

    ``inline``: bytes that travel inside the announcement. ``chunk``: bytes of a chunk, where there are more.
    """

    inline: int
    chunk: int
    patience: Patience
    speed: float = 0.0
    """Bytes a second of the last update that went in chunks; 0 before the first."""
    _update: Announcement | None = field(init=False, default=None)

    @property
    def empty(self) -> bool:
        """Whether no update is without a receipt."""
        return self._update is None

    @property
    def wake(self) -> float | None:
        """When `say` has something to say; None when that depends on others."""
        return None if self._update is None or self._update.at == math.inf else self._update.at

    def holds(self, epoch: int, task: int) -> bool:
        """Whether it is this task's update that has no receipt."""
        return self._update is not None and self._update.identity == (epoch, task)

    def put(self, pending: Pending, at: float = math.inf) -> None:
        """An update to be announced at ``at``; infinity where the server is not known to be there."""
        ref = transfer.refer(pending.update, chunk=self.chunk, inline=min(self.inline, self.chunk))
        self._update = Announcement(pending, ref, self.patience, at)

    def drop(self) -> None:
        """Forget the update: nobody waits for it any more."""
        self._update = None

    def cut(self, inline: int, chunk: int) -> None:
        """These sizes are what the broker takes; an update that was cut to others is cut again."""
        self.inline, self.chunk = inline, chunk
        if self._update is not None and self._update.ref.chunk != chunk:
            self.put(self._update.pending, self._update.at)

    def schedule(self, at: float) -> None:
        """The server is there: announce at ``at`` what there is."""
        if self._update is not None:
            self._update.at = at

    def interrupt(self) -> None:
        """The connection is lost."""
        if self._update is not None:
            self._update.interrupt()

    def remind(self, now: float) -> None:
        """The server asks for the update."""
        if self._update is not None:
            self._update.remind(now)

    def grant(self, sha256: bytes, indices: tuple[int, ...], now: float) -> Iterator[tuple[int, bytes]]:
        """The chunks to send for a credit; none where it is for another update than this one."""
        if self._update is not None and self._update.ref.sha256 == sha256:
            yield from self._update.pieces(indices, now)

    def settle(self, epoch: int, task: int, now: float) -> bool:
        """There is a receipt; True where it is for the update that is here, which is done then."""
        if self._update is None or not self.holds(epoch, task):
            return False
        self.speed = self._update.speed(now) or self.speed
        self._update = None
        return True

    def say(self, traffic: Traffic, now: float) -> Upload | None:
        """The announcement, where it is due; ``traffic`` is what the transport has counted."""
        update = self._update
        if update is None or not update.due(now):
            return None
        # The bytes that follow are told with the announcement: they count for the round that they belong to.
        told = Traffic(traffic.sent + update.coming, traffic.received)
        return Upload(*update.identity, update.ref, told)
