"""Updates on their way up: the server grants credits, so that a broker never buffers more than was asked for.

A credit is a lease: when its chunks do not come in time they are asked for again, and a client that stays silent loses
its place to the next in the queue; it announces its update again when it can.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_client.errors import WireError
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Assembly, count


@dataclass(frozen=True)
class Grant:
    """Chunks of its blob that a client may send now."""

    client: str
    sha256: bytes
    indices: tuple[int, ...]


@dataclass
class _Incoming:
    assembly: Assembly
    wake: float
    outstanding: set[int] = field(default_factory=set)
    tries: int = 0


@dataclass
class Uploads:
    """All uploads under way and those that wait.

    ``most`` uploads are open at a time, each with at most ``window`` chunks granted; ``limit`` is the size of the
    largest update in bytes; ``lease`` the seconds without a chunk after which a grant is repeated, ``patience`` times.
    """

    most: int
    window: int
    limit: int
    lease: float = 10.0
    patience: int = 6
    _open: dict[str, _Incoming] = field(default_factory=dict)
    _queue: dict[str, BlobRef] = field(default_factory=dict)

    @property
    def wake(self) -> float | None:
        """When `tick` has something to do; 0 is at once."""
        if self._queue and len(self._open) < self.most:
            return 0.0
        return min((incoming.wake for incoming in self._open.values()), default=None)

    def announce(self, client: str, ref: BlobRef, now: float) -> list[Grant]:
        """A client has a blob to send.

        Raises:
            WireError: the blob is larger than any update of this model can be.
        """
        if ref.size > self.limit:
            raise WireError(f"update of {ref.size} bytes; at most {self.limit} fit this model")
        current = self._open.get(client)
        if current is not None and current.assembly.ref.sha256 == ref.sha256:
            return self._grant(client, current, now, again=True)
        self._open.pop(client, None)
        self._queue[client] = ref
        return self._admit(now)

    def chunk(
        self, client: str, sha256: bytes, index: int, data: bytes, now: float
    ) -> tuple[bytes | None, list[Grant]]:
        """Take one chunk; the whole blob once it is complete and verified, and what is granted next.

        Raises:
            WireError: nobody asked for this chunk, or the blob is not what its reference names; its client starts anew.
        """
        incoming = self._open.get(client)
        if incoming is None or incoming.assembly.ref.sha256 != sha256:
            raise WireError(f"chunk of an upload by {client} that is not under way")
        ref = incoming.assembly.ref
        if index >= count(ref) or len(data) != min(ref.chunk, ref.size - index * ref.chunk):
            raise WireError(f"chunk {index} of {len(data)} bytes does not belong to the upload of {client}")
        incoming.outstanding.discard(index)
        if not incoming.assembly.add(index, data):
            return None, []
        incoming.wake, incoming.tries = now + self.lease, 0
        if not incoming.assembly.complete:
            more = len(incoming.outstanding) <= self.window // 2
            return None, self._grant(client, incoming, now) if more else []
        del self._open[client]
        return incoming.assembly.take(), self._admit(now)

    def tick(self, now: float) -> list[Grant]:
        """Repeat grants whose lease has run out, and give up on clients that stay silent."""
        grants = []
        for client, incoming in list(self._open.items()):
            if now < incoming.wake:
                continue
            incoming.tries += 1
            if incoming.tries > self.patience:
                del self._open[client]
            else:
                grants += self._grant(client, incoming, now, again=True)
        return grants + self._admit(now)

    def forget(self, client: str, now: float) -> list[Grant]:
        """A client is gone: its place is free."""
        self._queue.pop(client, None)
        self._open.pop(client, None)
        return self._admit(now)

    def _admit(self, now: float) -> list[Grant]:
        return list(self._admitted(now))

    def _admitted(self, now: float) -> Iterator[Grant]:
        while self._queue and len(self._open) < self.most:
            client = next(iter(self._queue))
            incoming = _Incoming(Assembly(self._queue.pop(client), limit=self.limit), now + self.lease)
            self._open[client] = incoming
            yield from self._grant(client, incoming, now)

    def _grant(self, client: str, incoming: _Incoming, now: float, *, again: bool = False) -> list[Grant]:
        if again:
            incoming.outstanding.clear()
        incoming.wake = now + self.lease
        room = self.window - len(incoming.outstanding)
        wanted = incoming.assembly.missing(self.window + len(incoming.outstanding))
        indices = tuple(index for index in wanted if index not in incoming.outstanding)[:room]
        incoming.outstanding.update(indices)
        return [Grant(client, incoming.assembly.ref.sha256, indices)] if indices else []
