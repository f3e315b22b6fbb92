"""Updates on their way up: the server grants credits, so that a broker never buffers more than was asked for.

A credit is a lease: when its chunks do not come in time they are asked for again, and a client that stays silent loses
its place to the next in the queue. What has come of its update stays; it announces the update again when it can, and is
asked for the rest. This module counts chunks; their bytes are on the disk (`broker_server.spool`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from edge_client.errors import WireError
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Checklist, count

_DAMAGES = 4
"""Damaged updates of one client for one task after which no more is taken: it could send garbage all round."""


@dataclass(frozen=True)
class Grant:
    """Chunks of its blob that a client may send now."""

    client: str
    sha256: bytes
    indices: tuple[int, ...]


@dataclass
class _Incoming:
    checklist: Checklist
    wake: float
    since: float
    """When it got its place."""
    outstanding: set[int] = field(default_factory=set)
    tries: int = 0


@dataclass
class Uploads:
    """All uploads under way and those that wait.

    ``most`` uploads are open at a time, each with at most ``window`` chunks granted; ``limit`` is the size of the
    largest update in bytes; ``lease`` the seconds without a chunk after which a grant is repeated, ``patience`` times;
    ``turn`` the seconds after which a client makes way where others wait: one that sends a byte now and then would keep
    its place for ever.
    """

    most: int
    window: int
    limit: int
    lease: float = 10.0
    patience: int = 6
    turn: float = 30.0
    _open: dict[str, _Incoming] = field(default_factory=dict)
    _queue: dict[str, BlobRef] = field(default_factory=dict)
    _parked: dict[str, Checklist] = field(default_factory=dict)
    """What has come of updates whose clients have no place now."""
    _held: set[str] = field(default_factory=set)
    """Clients of whom nothing more is taken before they announce it anew."""
    _damages: Counter[str] = field(default_factory=Counter)
    """By client, how many of its blobs were not what it announced."""

    @property
    def wake(self) -> float | None:
        """When `tick` has something to do; 0 is at once."""
        if self._queue and len(self._open) < self.most:
            return 0.0
        times = [incoming.wake for incoming in self._open.values()]
        if self._queue:
            times += [incoming.since + self.turn for incoming in self._open.values()]
        return min(times, default=None)

    def resume(self, kept: Mapping[str, Checklist]) -> None:
        """What had come before a restart, by client; more is taken once it is announced anew."""
        self._parked.update(kept)
        self._held.update(kept)

    def here(self, client: str, ref: BlobRef) -> bool:
        """Whether all of this blob has come in an earlier life of the server; it is forgotten then."""
        checklist = self._parked.get(client)
        if checklist is None or checklist.ref != ref or not checklist.complete:
            return False
        del self._parked[client]
        self._held.discard(client)
        return True

    def announce(self, client: str, ref: BlobRef, now: float) -> list[Grant]:
        """A client has a blob to send.

        Raises:
            WireError: the blob is larger than any update of this model can be.
        """
        if ref.size > self.limit:
            raise WireError(f"update of {ref.size} bytes; at most {self.limit} fit this model")
        current = self._open.get(client)
        if current is not None and current.checklist.ref == ref:
            return self._grant(client, current, now, again=True)
        self._park(client)
        self._held.discard(client)
        self._queue[client] = ref
        return self._admit(now)

    def lacks(self, client: str, sha256: bytes, index: int, size: int) -> bool:
        """Whether this chunk of ``size`` bytes is one that has not come; False when it has.

        Raises:
            WireError: nobody asked for it.
        """
        checklist = self._checklist(client, sha256)
        if index >= count(checklist.ref) or not checklist.fits(index, size):
            raise WireError(f"chunk {index} of {size} bytes does not belong to the upload of {client}")
        return checklist.lacks(index)

    def ref(self, client: str) -> BlobRef:
        """The blob that a client sends; to be asked of one that sends one."""
        incoming = self._open.get(client)
        return self._parked[client].ref if incoming is None else incoming.checklist.ref

    def chunk(
        self, client: str, sha256: bytes, index: int, size: int, now: float
    ) -> tuple[BlobRef | None, list[Grant]]:
        """A chunk of ``size`` bytes has come; the blob once it is complete, and what is granted next.

        Raises:
            WireError: nobody asked for this chunk.
        """
        incoming = self._open.get(client)
        new = self.lacks(client, sha256, index, size)
        if incoming is not None:
            incoming.outstanding.discard(index)
        checklist = self._checklist(client, sha256)
        if not new or not checklist.mark(index, size):
            return None, []
        if checklist.complete:
            self._open.pop(client, None)
            self._parked.pop(client, None)
            self._queue.pop(client, None)
            return checklist.ref, self._admit(now)
        if incoming is None:
            return None, []  # sent before its place was lost: good all the same
        incoming.wake, incoming.tries = now + self.lease, 0
        more = len(incoming.outstanding) <= self.window // 2
        return None, self._grant(client, incoming, now) if more else []

    def tick(self, now: float) -> list[Grant]:
        """Repeat grants whose lease has run out, and take the places of clients that stay silent."""
        grants = []
        for client, incoming in list(self._open.items()):
            if now < incoming.wake:
                continue
            incoming.tries += 1
            if incoming.tries > self.patience:
                self._park(client)
            else:
                grants += self._grant(client, incoming, now, again=True)
        return grants + self._make_way(now) + self._admit(now)

    def forget(self, client: str, now: float) -> list[Grant]:
        """A client is gone: its place is free, and what has come stays."""
        self._queue.pop(client, None)
        self._park(client)
        return self._admit(now)

    def hold(self, client: str, now: float) -> list[Grant]:
        """What a client has announced is not believed any more: what has come is of use if it announces it anew."""
        self._held.add(client)
        return self.forget(client, now)

    def damaged(self, client: str) -> str:
        """What a client sent is not what it announced; what there is to say of it.

        Raises:
            WireError: that was once too often.
        """
        self._damages[client] += 1
        if self._damages[client] >= _DAMAGES:
            raise WireError(f"the update came damaged {_DAMAGES} times: its radio, its disk or somebody between errs")
        return f"the update of {client} came damaged; it is sent again"

    def drop(self, client: str, now: float) -> list[Grant]:
        """Nothing is wanted of a client any more."""
        grants = self.forget(client, now)
        self._parked.pop(client, None)
        self._held.discard(client)
        del self._damages[client]
        return grants

    def _checklist(self, client: str, sha256: bytes) -> Checklist:
        incoming = self._open.get(client)
        checklist = self._parked.get(client) if incoming is None else incoming.checklist
        if checklist is None or client in self._held or checklist.ref.sha256 != sha256:
            raise WireError(f"chunk of an upload by {client} that is not under way")
        return checklist

    def _park(self, client: str) -> None:
        incoming = self._open.pop(client, None)
        if incoming is not None:
            self._parked[client] = incoming.checklist

    def _make_way(self, now: float) -> list[Grant]:
        """Let those who wait have the places of those who had theirs for long; these wait in turn."""
        grants = []
        for client, incoming in list(self._open.items()):
            if not self._queue:
                break
            if now >= incoming.since + self.turn:
                self._park(client)
                grants += self._admit(now)
                self._queue[client] = incoming.checklist.ref
        return grants

    def _admit(self, now: float) -> list[Grant]:
        return list(self._admitted(now))

    def _admitted(self, now: float) -> Iterator[Grant]:
        while self._queue and len(self._open) < self.most:
            client = next(iter(self._queue))
            ref, checklist = self._queue.pop(client), self._parked.pop(client, None)
            if checklist is None or checklist.ref != ref or checklist.complete:
                checklist = Checklist(ref, limit=self.limit)
            incoming = _Incoming(checklist, now + self.lease, now)
            self._open[client] = incoming
            yield from self._grant(client, incoming, now)

    def _grant(self, client: str, incoming: _Incoming, now: float, *, again: bool = False) -> list[Grant]:
        if again:
            incoming.outstanding.clear()
        incoming.wake = now + self.lease
        room = self.window - len(incoming.outstanding)
        wanted = incoming.checklist.missing(self.window + len(incoming.outstanding))
        indices = tuple(index for index in wanted if index not in incoming.outstanding)[:room]
        incoming.outstanding.update(indices)
        return [Grant(client, incoming.checklist.ref.sha256, indices)] if indices else []
