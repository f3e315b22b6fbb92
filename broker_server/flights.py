"""Tasks in flight: of one client each, many at a time, each from the version that was the newest when it was begun.

A client has at most one that is not answered. It stays open when its deadline is over or its client is away, for an
update that comes late counts too (less, see `aggregation.staleness`); only its slot is free then. It ends when its
update is recorded, when the client declines it or starts anew without it, and when it is too old.

Like the coordinator it is pure: what happens goes in, actions come out.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.config import Federation
from broker_server.rates import update_plan
from broker_server.records import Task
from broker_server.roster import Member
from broker_server.training import train_plan
from broker_server.uploads import Grant, Uploads
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Host, PlainHost

State = Literal["opening", "asked", "away", "ready", "recording"]
"""Not in the ledger yet; asked; asked, and not counted on any more; its update is here, or on its way to the ledger."""
Identity = tuple[int, int]
Way = tuple[int, int]
"""From which version to which."""


@dataclass
class Flight:
    """One task that is not answered yet."""

    task: Task
    boot: bytes = b""
    """The life of its client that was asked; empty where an earlier server has asked."""
    state: State = "opening"
    deadline: float = math.inf
    way: Way | None = None
    """What its invitation's delta leads over; None before there is one."""

    @property
    def identity(self) -> Identity:
        """Epoch and number, as the ledger knows it."""
        return self.task.epoch, self.task.task


@dataclass
class Flights:
    """All tasks in flight; ``limit`` is the size of the largest update in bytes."""

    settings: Federation
    limit: int
    voice: Host = field(default_factory=PlainHost)
    _flights: dict[str, Flight] = field(init=False, default_factory=dict)
    """By client."""
    _ready: deque[tuple[str, bytes | None]] = field(init=False, default_factory=deque)
    """Updates that are here and wait for the version before them to be made; None is one in chunks that were kept."""
    _deltas: dict[Way, m.BlobRef | None] = field(init=False, default_factory=dict)
    """What is built, or being built."""
    _uploads: Uploads = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings.transfer
        self._uploads = Uploads(limits.uploads, limits.window, self.limit, turn=self.settings.limits.turn)

    # What there is.

    def __contains__(self, client: str) -> bool:
        return client in self._flights

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    def of(self, client: str) -> Flight | None:
        """A client's flight."""
        return self._flights.get(client)

    def find(self, epoch: int, task: int, client: str) -> Flight | None:
        """The flight of this identity."""
        flight = self._flights.get(client)
        return flight if flight is not None and flight.identity == (epoch, task) else None

    def count(self, kind: str, *states: State) -> int:
        """How many there are of a kind in these states; in any but "away" where none are named."""
        return sum(
            flight.task.kind == kind and (flight.state in states if states else flight.state != "away")
            for flight in self._flights.values()
        )

    @property
    def versions(self) -> frozenset[int]:
        """Versions that clients in flight are to work on, and those that lead them there."""
        flights = self._flights.values()
        return frozenset({flight.task.version for flight in flights} | {way[0] for way in self._deltas})

    @property
    def wake(self) -> float | None:
        """When `tick` has something to do."""
        due = [flight.deadline for flight in self._flights.values() if flight.state == "asked"]
        return min((time for time in (self._uploads.wake, *due) if time is not None), default=None)

    def blobs(self) -> list[m.BlobRef]:
        """Deltas that travel in chunks; those with the same bytes once."""
        refs = [ref for ref in self._deltas.values() if ref is not None and ref.inline is None]
        return list({ref.sha256: ref for ref in refs}.values())

    # Asking.

    def launch(self, task: Task, boot: bytes) -> list[e.Action]:
        """Begin a task."""
        (client,) = task.cohort
        self._flights[client] = Flight(task, boot)
        return [e.OpenTask(task)]

    def restore(self, task: Task, now: float) -> None:
        """A task of an earlier server is still open; its client may be at it."""
        self._flights[task.cohort[0]] = flight = Flight(task)
        self.ask(flight, now)

    def ask(self, flight: Flight, now: float) -> None:
        """It is in the ledger, and its client is counted on: its time runs, unless it does already."""
        if flight.state in ("opening", "away"):
            flight.state, flight.deadline = "asked", now + self._seconds(flight.task)

    def invite(
        self, flight: Flight, member: Member, versions: Mapping[int, bytes], void: Identity | None = None
    ) -> list[e.Action]:
        """Invite its client, now where the delta is there, else once it is built.

        ``versions`` are known digests; ``void`` is the task that the client's last recorded update was for, where that
        is void.
        """
        held = member.version if versions.get(member.version) == member.digest else 0
        if self.settings.codec.kind == "none" and held != flight.task.version:
            held = 0  # a full snapshot leads from anywhere, so one blob serves all
        before, way = flight.way, (held, flight.task.version)
        flight.way = way
        swept = self._sweep(before) if before != way else []
        if held == flight.task.version or self._deltas.get(way) is not None:
            return [*swept, self._invitation(flight, member, versions, void)]
        first = way not in self._deltas
        self._deltas.setdefault(way, None)
        return [*swept, e.Prepare(*way)] if first else swept

    def prepared(self, way: Way, ref: m.BlobRef) -> tuple[list[e.Action], list[Flight]]:
        """A delta is built: what to do with it, and whom it lets invite."""
        waiting = [flight for flight in self._flights.values() if flight.way == way and flight.state == "asked"]
        if way not in self._deltas:
            return [e.Sweep(ref)] if ref.inline is None else [], []
        # From all versions of one anchor it is the same: who pulls it already would get it again.
        spread: list[e.Action] = [e.Spread(ref)] if ref.inline is None and ref not in self.blobs() else []
        self._deltas[way] = ref
        return spread + self._sweep(way), waiting

    # What clients do.

    def announce(self, flight: Flight, blob: m.BlobRef, now: float) -> list[e.Action]:
        """A client has its update: in ``blob``, or to be sent in chunks."""
        (client,) = flight.task.cohort
        if flight.state in ("ready", "recording"):
            return []
        try:
            data = transfer.unwrap(blob)
            if data is not None or self._uploads.here(client, blob):
                self._take(client, data)
                return []
            return self._credit(self._uploads.announce(client, blob, now))
        except WireError as error:
            return self.refuse(client, str(error), now)

    def chunk(self, client: str, sha256: bytes, index: int, payload: bytes, now: float) -> list[e.Action]:
        """A chunk of an update.

        Raises:
            WireError: nobody asked for it.
        """
        new, flight = self._uploads.lacks(client, sha256, index, len(payload)), self._flights.get(client)
        if flight is None:
            raise WireError(f"chunk of an upload by {client} whose task is over")
        ref = self._uploads.ref(client)
        kept: list[e.Action] = [e.Keep(*flight.identity, client, ref, index, payload)] if new else []
        done, grants = self._uploads.chunk(client, sha256, index, len(payload), now)
        if done is not None:
            self._take(client, None)
        return kept + self._credit(grants)

    def resume(self, kept: Mapping[str, transfer.Checklist]) -> None:
        """Chunks of updates that came before the server's last restart, by client."""
        self._uploads.resume({client: checklist for client, checklist in kept.items() if client in self._flights})

    def damaged(self, client: str, now: float) -> list[e.Action]:
        """A client's update is not what it announced; it sends the update again."""
        self._flights[client].state = "asked"
        try:
            return [e.Log(self._uploads.damaged(client))]
        except WireError as error:
            return self.refuse(client, str(error), now)

    def record(self, most: int | None = None) -> list[e.Action]:
        """Hand updates to the ledger: those of evaluations, and at most so many of training; the others wait."""
        actions: list[e.Action] = []
        waiting: deque[tuple[str, bytes | None]] = deque()
        while self._ready:
            client, data = self._ready.popleft()
            flight = self._flights[client]
            trains = flight.task.kind == "train"
            if trains and most is not None and most <= 0:
                waiting.append((client, data))
                continue
            most = most - 1 if trains and most is not None else most
            flight.state = "recording"
            actions.append(e.Record(*flight.identity, client, data))
        self._ready = waiting
        return actions

    def refuse(self, client: str, reason: str, now: float) -> list[e.Action]:
        """A client's update cannot be used."""
        receipt = m.Receipt(*self._flights[client].identity, "refused", reason[:500])
        said = [self._tell(client, receipt), e.Log(f"refused an update of {client}: {reason}")]
        return [*said, *self.end(client, now)]

    def leave(self, client: str, now: float) -> list[e.Action]:
        """A client is gone: its slot is free, and so is its place among the uploads."""
        flight = self._flights.get(client)
        if flight is not None and flight.state == "asked":
            flight.state = "away"
        return self._credit(self._uploads.forget(client, now))

    def disown(self, client: str, now: float) -> list[e.Action]:
        """What a client has announced is not believed any more, nor what is here of it and waits."""
        flight = self._flights.get(client)
        if flight is not None and flight.state == "ready":
            return self.end(client, now)
        return self._credit(self._uploads.hold(client, now))

    def tick(self, now: float) -> list[e.Action]:
        """Ask again for chunks that do not come, and count no more on clients whose time is over."""
        for flight in self._flights.values():
            if flight.state == "asked" and now >= flight.deadline:
                flight.state = "away"
        return self._credit(self._uploads.tick(now))

    # Their end.

    def recorded(self, client: str, now: float) -> list[e.Action]:
        """A client's update is in the ledger."""
        flight = self._flights.pop(client)
        return [*self._credit(self._uploads.drop(client, now)), *self._sweep(flight.way)]

    def end(self, client: str, now: float) -> list[e.Action]:
        """A task ends without an update; the ledger says so to those who ask."""
        flight = self._flights.pop(client)
        actions: list[e.Action] = [e.CloseTask(*flight.identity, "void")]
        if flight.state == "ready":
            self._ready = deque((other, data) for other, data in self._ready if other != client)
            actions.append(e.Inquire(*flight.identity, client))
        return [*actions, *self._credit(self._uploads.drop(client, now)), *self._sweep(flight.way)]

    def expire(self, version: int, now: float) -> list[e.Action]:
        """End those that are too old for the sum that leads on from this version."""
        oldest = version - self.settings.round.max_staleness
        old = [
            client
            for client, flight in self._flights.items()
            if flight.task.version < oldest and flight.state != "recording"
        ]
        return [action for client in old for action in self.end(client, now)]

    # Small things.

    def _seconds(self, task: Task) -> float:
        return self.settings.round.deadline if task.kind == "train" else self.settings.evaluation.deadline

    def _take(self, client: str, data: bytes | None) -> None:
        flight = self._flights.get(client)
        if flight is not None and flight.state in ("asked", "away") and self.voice.knows(client):
            flight.state = "ready"
            self._ready.append((client, data))

    def _sweep(self, way: Way | None) -> list[e.Action]:
        """Clear a delta away that nobody is on any more."""
        if way is None or any(flight.way == way for flight in self._flights.values()):
            return []
        ref = self._deltas.get(way)
        if ref is None:
            return []
        del self._deltas[way]
        return [e.Sweep(ref)] if ref.inline is None else []

    def _invitation(
        self, flight: Flight, member: Member, versions: Mapping[int, bytes], void: Identity | None
    ) -> e.Action:
        task = flight.task
        (client,) = task.cohort
        assert flight.way is not None
        return self._tell(
            client,
            m.Invitation(
                *flight.identity,
                task.task,
                task.kind,
                train_plan(self.settings, task.makes),
                update_plan(self.settings, task, client, member.samples, member.uplink),
                self.settings.federation.seed,
                self._seconds(task),
                flight.way[0],
                task.version,
                versions[task.version],
                self._deltas.get(flight.way),
                void,
            ),
        )

    def _credit(self, grants: list[Grant]) -> list[e.Action]:
        return [self._tell(grant.client, m.Credit(grant.sha256, grant.indices)) for grant in grants]

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(Topics(self.settings.federation.name).down(client), self.voice.tell(client, message))
