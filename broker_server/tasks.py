"""The life of one task: its cohort, what each member has done, and what their results add up to.

Like the coordinator it is pure: what happens goes in, actions come out, and `OpenTask.outcome` says when it is over.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker_server import events as e
from broker_server.config import Federation
from broker_server.rates import update_plan
from broker_server.records import Task
from broker_server.selection import Candidate, select
from broker_server.tally import Tally
from broker_server.training import train_plan
from broker_server.uploads import Grant, Uploads
from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Host, PlainHost

State = Literal["asked", "recording", "recorded", "refused", "gone"]
Outcome = Literal["done", "void"]


@dataclass
class OpenTask:
    """A task from its opening to its close.

    ``versions`` are the digests of the versions that a delta may start from, with the task's own; ``limit`` is the
    size of the largest update in bytes; ``spares`` are the clients that may be asked when members are lost; ``run`` is
    that of the plan.
    """

    task: Task
    settings: Federation
    versions: Mapping[int, bytes]
    limit: int
    spares: set[str] = field(default_factory=set)
    voice: Host = field(default_factory=PlainHost)
    run: int = 0
    opened: bool = field(init=False, default=False)
    tally: Tally = field(init=False, default_factory=Tally)
    """What the recorded results come to."""
    _members: dict[str, State] = field(init=False, default_factory=dict)
    _counts: Counter[State] = field(init=False, default_factory=Counter)
    _invited: set[str] = field(init=False, default_factory=set)
    _refusals: dict[str, str] = field(init=False, default_factory=dict)
    _waiting: dict[int, dict[str, None]] = field(init=False, default_factory=dict)
    """By the version that they hold, the clients whose delta is not built yet."""
    _plans: dict[str, m.UpdatePlan] = field(init=False, default_factory=dict)
    """By client, how it encodes its update."""
    _voids: dict[str, tuple[int, int] | None] = field(init=False, default_factory=dict)
    """By client, the void task that its last recorded update was for."""
    _deltas: dict[int, m.BlobRef] = field(init=False, default_factory=dict)
    """By the version that they start from, the blobs that lead to the task's version."""
    _deadline: float = field(init=False, default=math.inf)
    _uploads: Uploads = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings.transfer
        self._uploads = Uploads(limits.uploads, limits.window, self.limit, turn=self.settings.limits.turn)
        for client in self.task.cohort:
            self._set(client, "asked")

    # What it is.

    @property
    def identity(self) -> tuple[int, int]:
        """Epoch and number, as the ledger knows it."""
        return self.task.epoch, self.task.task

    @property
    def seconds(self) -> float:
        """How long its members have."""
        sections = self.settings
        return sections.round.deadline if self.task.kind == "train" else sections.evaluation.deadline

    @property
    def goal(self) -> int:
        """Results that end it."""
        sections = self.settings
        wanted = sections.round.cohort if self.task.kind == "train" else sections.evaluation.clients
        return min(wanted, len(self.task.cohort))

    @property
    def fewest(self) -> int:
        """Results without which it is void; an evaluation makes do with any."""
        return self.settings.round.minimum if self.task.kind == "train" else 0

    @property
    def results(self) -> int:
        """Results that are recorded."""
        return self._counts["recorded"]

    @property
    def contributors(self) -> list[str]:
        """Members whose results are recorded."""
        return [client for client, state in self._members.items() if state == "recorded"]

    @property
    def wake(self) -> float | None:
        """When `tick` or `outcome` has something new to say."""
        due = self._deadline if self.opened and not self._counts["recording"] else None
        return min((time for time in (self._uploads.wake, due) if time is not None), default=None)

    def __contains__(self, client: str) -> bool:
        return client in self._members

    def outcome(self, now: float) -> Outcome | None:
        """Whether it is over: with what it wants, with all that can still come, or at its deadline."""
        if not self.opened or self._counts["recording"]:
            return None
        late = now >= self._deadline
        if self.results >= self.goal or (self.results >= self.fewest and (late or not self._counts["asked"])):
            return "done"
        return "void" if late else None

    def blobs(self) -> list[m.BlobRef]:
        """Deltas that travel in chunks; those with the same bytes once."""
        return list({ref.sha256: ref for ref in self._deltas.values() if ref.inline is None}.values())

    # Opening and inviting.

    def open(self, now: float) -> None:
        """It is in the ledger: members may be invited, and their time runs."""
        if not self.opened:
            self.opened, self._deadline = True, now + self.seconds

    def uninvited(self) -> list[str]:
        """Members that are asked and have no invitation."""
        return [client for client in self._asked() if client not in self._invited]

    def unanswered(self) -> list[str]:
        """Members that have an invitation and have not answered."""
        return [client for client in self._asked() if client in self._invited]

    def greet(self, client: str, *, available: bool) -> bool:
        """A client says hello; True when it is to be invited, for the first time or again."""
        state = self._members.get(client)
        if state is None:
            (self.spares.add if available else self.spares.discard)(client)
            return False
        if not self.opened or not available or state not in ("asked", "gone"):
            return False
        self._set(client, "asked")
        return True

    def invite(
        self,
        client: str,
        version: int,
        digest: bytes,
        uplink: float = 0.0,
        void: tuple[int, int] | None = None,
        samples: int = 1,
    ) -> list[e.Action]:
        """Invite a client that holds this version: now where the delta is there, else once it is built.

        ``uplink`` is how many bytes a second it can send, 0 where it has not said; ``void`` the task that its last
        recorded update was for, where that is void.
        """
        self._invited.add(client)
        self._voids[client] = void
        self._plans[client] = update_plan(self.settings, self.task, client, samples, uplink)
        held = version if self.versions.get(version) == digest else 0
        if self.settings.codec.kind == "none" and held != self.task.version:
            held = 0  # a full snapshot leads from anywhere, so one blob serves all
        if held == self.task.version or held in self._deltas:
            return [self._invitation(client, held)]
        first = held not in self._waiting
        self._waiting.setdefault(held, {})[client] = None
        return [e.Prepare(held, self.task.version)] if first else []

    def prepared(self, held: int, ref: m.BlobRef) -> list[e.Action]:
        """The delta from version ``held`` is built."""
        # From all versions of one anchor it is the same: who pulls it already would get it again.
        spread: list[e.Action] = [e.Spread(ref)] if ref.inline is None and ref not in self.blobs() else []
        self._deltas[held] = ref
        return spread + [self._invitation(client, held) for client in self._waiting.pop(held, ())]

    def refill(self) -> list[e.Action]:
        """Ask others where members are lost."""
        members, round_ = len(self._members), self.task.round
        short = self.goal - self.results - self._counts["asked"] - self._counts["recording"]
        if not self.opened or short <= 0 or not self.spares:
            return []
        rng = random.Random(f"{self.settings.federation.seed}/{round_}/{self.task.task}/{members}")  # noqa: S311
        more = select([Candidate(client) for client in self.spares], short, rng)
        self.spares.difference_update(more)
        for client in more:
            self._set(client, "asked")
        return [e.Enlarge(*self.identity, tuple(more))]

    # What its members do.

    def announce(self, client: str, blob: m.BlobRef, now: float) -> list[e.Action]:
        """A member has an update: in ``blob``, or to be sent in chunks."""
        state = self._members[client]
        if state == "recording":
            return []
        if state == "recorded":
            return [self._tell(client, m.Receipt(*self.identity, "recorded"))]
        if state == "refused":
            return [self._tell(client, m.Receipt(*self.identity, "refused", self._refusals[client]))]
        self._set(client, "asked")
        try:
            data = transfer.unwrap(blob)
            if data is not None or self._uploads.here(client, blob):
                return self._take(client, data)
            return self._credit(self._uploads.announce(client, blob, now))
        except WireError as error:
            return self.refuse(client, str(error))

    def chunk(self, client: str, sha256: bytes, index: int, payload: bytes, now: float) -> list[e.Action]:
        """A chunk of a member's update.

        Raises:
            WireError: nobody asked for it.
        """
        new = self._uploads.lacks(client, sha256, index, len(payload))
        kept: list[e.Action] = (
            [e.Keep(*self.identity, client, self._uploads.ref(client), index, payload)] if new else []
        )
        ref, grants = self._uploads.chunk(client, sha256, index, len(payload), now)
        return kept + self._credit(grants) + ([] if ref is None else self._take(client, None))

    def resume(self, kept: Mapping[str, transfer.Checklist]) -> None:
        """Chunks of updates that came before the server's last restart, by client."""
        self._uploads.resume(kept)

    def damaged(self, client: str) -> list[e.Action]:
        """A member's update is not what it announced: its radio or its disk errs, and it sends the update again."""
        self._set(client, "asked")
        try:
            return [e.Log(self._uploads.damaged(client))]
        except WireError as error:
            return self.refuse(client, str(error))

    def recorded(self, event: e.Recorded) -> None:
        """A member's update is in the ledger."""
        self._set(event.client, "recorded")
        self.tally.add(event.samples, event.scalars)

    def refuse(self, client: str, reason: str) -> list[e.Action]:
        """A member's update cannot be used, and the member is not asked again."""
        self._refusals[client] = reason[:500]
        self._set(client, "refused")
        receipt = m.Receipt(*self.identity, "refused", self._refusals[client])
        return [self._tell(client, receipt), e.Log(f"refused an update of {client}: {reason}")]

    def lose(self, client: str) -> None:
        """A member will not answer, for now."""
        if self._members.get(client) == "asked":
            self._set(client, "gone")

    def leave(self, client: str, now: float) -> list[e.Action]:
        """A client is gone: nothing is asked of it, and its place among the uploads is free."""
        self.spares.discard(client)
        self.lose(client)
        return self._credit(self._uploads.forget(client, now))

    def disown(self, client: str, now: float) -> list[e.Action]:
        """What a client has announced is not believed any more."""
        return self._credit(self._uploads.hold(client, now))

    def tick(self, now: float) -> list[e.Action]:
        """Ask again for chunks that do not come."""
        return self._credit(self._uploads.tick(now))

    # Its end.

    def sweep(self) -> list[e.Action]:
        """Clear its deltas away, each as often as it was built."""
        return [e.Sweep(delta) for delta in self._deltas.values() if delta.inline is None]

    def void(self) -> list[e.Action]:
        """Too few results came: none of them counts. Once the ledger says so, their clients are told (`voided`)."""
        return [*self.sweep(), e.CloseTask(*self.identity, "void")]

    def voided(self) -> list[e.Action]:
        """Tell those who were told that theirs is recorded."""
        return [self._tell(client, m.Receipt(*self.identity, "void")) for client in self.contributors]

    # Small things.

    def _asked(self) -> list[str]:
        return [client for client, state in self._members.items() if state == "asked"]

    def _set(self, client: str, state: State) -> None:
        before = self._members.get(client)
        if before is not None:
            self._counts[before] -= 1
        self._members[client] = state
        self._counts[state] += 1

    def _take(self, client: str, data: bytes | None) -> list[e.Action]:
        if self._members.get(client) not in ("asked", "gone") or not self.voice.knows(client):
            return []
        self._set(client, "recording")
        return [e.Record(*self.identity, client, data)]

    def _invitation(self, client: str, held: int) -> e.Action:
        task = self.task
        return self._tell(
            client,
            m.Invitation(
                *self.identity,
                task.round,
                task.kind,
                train_plan(self.settings, task.makes, self.run),
                self._plans[client],
                self.settings.federation.seed,
                self.seconds,
                held,
                task.version,
                self.versions[task.version],
                self._deltas.get(held),
                self._voids[client],
            ),
        )

    def _credit(self, grants: list[Grant]) -> list[e.Action]:
        return [self._tell(grant.client, m.Credit(grant.sha256, grant.indices)) for grant in grants]

    def _tell(self, client: str, message: m.Message) -> e.Action:
        return e.Publish(Topics(self.settings.federation.name).down(client), self.voice.tell(client, message))
