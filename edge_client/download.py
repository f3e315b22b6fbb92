"""Pulling a published blob: a window of subscriptions to retained chunks, without I/O.

The client subscribes to a few chunk topics at a time, so it sets the pace and the broker does the fan-out. What does
not arrive is subscribed to again, then asked for: brokers drop retained messages that they have acknowledged.
"""

from dataclasses import InitVar, dataclass, field

from edge_client.errors import WireError
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import WINDOW, Assembly, unwrap

_LONGEST_REST = 600.0
"""Seconds to wait at most before what came damaged is pulled again."""


@dataclass(frozen=True)
class Pull:
    """What to do next: chunks to unsubscribe from, to subscribe to, and to ask the server for."""

    drop: tuple[int, ...] = ()
    take: tuple[int, ...] = ()
    ask: tuple[int, ...] = ()


@dataclass
class Download:
    """One blob on its way down.

    ``window`` is the number of chunks subscribed to at a time, ``patience`` the seconds without a new chunk after which
    the open ones are subscribed to again; it doubles each time, up to a minute. ``partial`` is what an earlier life of
    the client has of this blob.

    Raises:
        WireError: the blob is larger than ``limit`` bytes.
    """

    ref: BlobRef
    limit: int
    window: int = WINDOW
    patience: float = 5.0
    partial: InitVar[Assembly | None] = None
    wake: float | None = None
    _assembly: Assembly = field(init=False)
    _open: dict[int, None] = field(init=False, default_factory=dict)
    _arrived: list[int] = field(init=False, default_factory=list)
    _stalls: int = field(init=False, default=0)
    _damages: int = field(init=False, default=0)
    _resting: bool = field(init=False, default=False)

    def __post_init__(self, partial: Assembly | None) -> None:
        known = partial is not None and partial.ref == self.ref
        self._assembly = partial if known and partial is not None else Assembly(self.ref, limit=self.limit)

    @property
    def left(self) -> int:
        """How many chunks are missing."""
        return self._assembly.left

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return self._assembly.complete

    def start(self, now: float) -> Pull:
        """Begin, or begin again after the connection was lost: nothing is subscribed to any more."""
        if self._resting:
            return Pull()
        self._open.clear()
        self._arrived.clear()
        self.wake = now + self.patience
        return self._more(())

    def chunk(self, index: int, data: bytes, now: float) -> Pull:
        """Take one chunk; the window moves on when half of it has arrived."""
        if self._resting or not self._assembly.add(index, data):
            return Pull()
        self._stalls = 0
        self.wake = now + self.patience
        if self._open.pop(index, 0) is None:
            self._arrived.append(index)
        if self.complete or len(self._open) <= self.window // 2:
            return self._move()
        return Pull()

    def tick(self, now: float) -> Pull:
        """Where nothing has come for too long, subscribe again; from the second time on, ask for the chunks too."""
        if self.wake is None or now < self.wake:
            return Pull()
        if self._resting:
            self._resting = False
            return self.start(now)
        self._stalls = min(self._stalls + 1, 16)
        self.wake = now + min(60.0, self.patience * 2**self._stalls)
        again = tuple(self._open)
        return Pull(drop=again, take=again, ask=again if self._stalls > 1 else ())

    def stop(self) -> Pull:
        """Give up: nothing stays subscribed to."""
        left = (*self._arrived, *self._open)
        self._arrived.clear()
        self._open.clear()
        self.wake = None
        return Pull(drop=left)

    def take(self) -> bytes:
        """The verified bytes.

        Raises:
            WireError: they are not what the reference names; every chunk is then forgotten, to start anew.
        """
        try:
            return self._assembly.take()
        except WireError:
            self._damages += 1
            raise
        finally:
            self._assembly.restart()

    def rest(self, now: float) -> Pull:
        """What came was damaged: begin anew after a while, that is twice as long each time."""
        pull = self.stop()
        self._resting = True
        self.wake = now + min(_LONGEST_REST, self.patience * 2.0 ** min(self._damages - 1, 16))
        return pull

    def _move(self) -> Pull:
        arrived, self._arrived = tuple(self._arrived), []
        return self._more(arrived)

    def _more(self, drop: tuple[int, ...]) -> Pull:
        take = self._fill()
        # What is retained is damaged, by whomever: only the server can put it right, and which chunk is not known.
        return Pull(drop, take, ask=take if self._damages else ())

    def _fill(self) -> tuple[int, ...]:
        room = self.window - len(self._open)
        wanted = [index for index in self._assembly.missing(room + len(self._open)) if index not in self._open][:room]
        self._open.update(dict.fromkeys(wanted))
        return tuple(wanted)


def check_blob(ref: BlobRef, limit: int) -> None:
    """Refuse a blob before anything is done about it.

    Raises:
        WireError: it is empty or larger than ``limit`` bytes, or its bytes within the reference are not what it names.
    """
    if unwrap(ref) is None and not 0 < ref.size <= limit:
        raise WireError(f"blob of {ref.size} bytes; 1 to {limit} are accepted here")
