"""Who is there: what each client has said of itself, and the bytes that its transport has counted."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from broker_server.selection import Candidate
from edge_client.wire.messages import Hello, Traffic


@dataclass
class Member:
    """One client, as its last hello described it."""

    boot: bytes
    version: int
    digest: bytes
    samples: int
    available: bool
    present: bool = True
    last_round: int = -1
    willing: bool = True
    """Whether it said that it may train: where its operator has it pause, it is not asked all the same."""
    uplink: float = 0.0
    """Bytes a second that it can send; 0 is not known."""
    traffic: Traffic = field(default_factory=Traffic)
    heard: float = 0.0
    """When it last said anything."""
    lapsed: bool = False
    """It is not there because it said nothing for too long."""

    @property
    def ready(self) -> bool:
        """Whether it is there and may train."""
        return self.present and self.available


@dataclass
class Roster:
    """All clients that have said hello in this epoch.

    ``counting`` says whether what a client counted before its first hello belongs to this run: not so after a restart
    of the server, when it was counted already. ``silence``: seconds without a word after which a client is not there
    any more: brokers lose last wills too.
    """

    counting: bool = True
    silence: float = math.inf
    voids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By client, epoch and number of the void task that its last recorded update was for."""
    up: int = 0
    """Bytes that clients have sent, as far as they have told."""
    down: int = 0
    _members: dict[str, Member] = field(default_factory=dict)
    _present: int = 0
    _due: float | None = None

    @property
    def wake(self) -> float | None:
        """When `lapse` has something to look at."""
        return self._due if self.silence < math.inf else None

    def hear(self, client: str, now: float) -> None:
        """A client has said something."""
        member = self._members.get(client)
        if member is None:
            return
        member.heard = now
        if member.lapsed:
            member.present, member.lapsed = True, False
            self._present += member.ready
        self._due = now + self.silence if self._due is None else self._due

    def lapse(self, now: float) -> list[str]:
        """Clients that have just been silent for too long."""
        if self._due is None or now < self._due:
            return []
        there = [(client, member) for client, member in self._members.items() if member.present]
        # The same sum as below: rounded another way, the time would come and nobody be gone, for ever.
        gone = [client for client, member in there if now >= member.heard + self.silence]
        for client in gone:
            member = self._members[client]
            self._present -= member.ready
            member.present, member.lapsed = False, True
        heard = (member.heard for _, member in there if member.present)
        self._due = min((time + self.silence for time in heard), default=None)
        return gone

    def hello(self, client: str, hello: Hello) -> Member:
        """Take a hello; a new boot nonce is a new life of the client."""
        before = self._members.get(client)
        held = hello.version, hello.digest, hello.samples, hello.available
        member = Member(hello.boot, *held, uplink=hello.uplink)
        if before is not None:
            member.last_round = before.last_round
        known = before is not None and before.boot == hello.boot
        if before is not None and known:
            member.traffic = before.traffic
        elif before is None and not self.counting:
            member.traffic = hello.traffic
        if before is not None:
            self._present -= before.ready
        self._members[client] = member
        self._present += member.ready
        self.count(client, hello.traffic)
        return member

    def steer(self, paused: Callable[[str], bool]) -> list[str]:
        """Have clients pause, or go on; those that are there and are affected."""
        changed = []
        for client, member in self._members.items():
            available = member.willing and not paused(client)
            if available != member.available:
                self._present += member.present and available
                self._present -= member.ready
                member.available = available
                changed += [client] if member.present else []
        return changed

    def goodbye(self, client: str, boot: bytes) -> bool:
        """A client is gone; False when that was an earlier life of it."""
        member = self._members.get(client)
        if member is None or member.boot != boot or not member.present:
            return False
        self._present -= member.ready
        member.present = False
        return True

    def part(self, client: str) -> bool:
        """A client is not counted on until it says hello again; False where it was not there."""
        member = self._members.get(client)
        return member is not None and self.goodbye(client, member.boot)

    def count(self, client: str, traffic: Traffic) -> None:
        """Take a client's counters, which only ever grow within one life."""
        member = self._members.get(client)
        if member is None:
            return
        up, down = traffic.sent - member.traffic.sent, traffic.received - member.traffic.received
        if up >= 0 and down >= 0:
            self.up, self.down, member.traffic = self.up + up, self.down + down, traffic

    def get(self, client: str) -> Member | None:
        """One client, None when it has not said hello."""
        return self._members.get(client)

    def present(self) -> int:
        """How many clients are there and may train."""
        return self._present

    def candidates(self) -> list[Candidate]:
        """Clients that may be asked."""
        return [
            Candidate(client, member.samples, member.available, member.last_round)
            for client, member in self._members.items()
            if member.present
        ]

    def versions(self, recent: int = 0) -> frozenset[int]:
        """Versions of the model that some client holds, who is there or may be back for it: it is ``recent`` or newer.

        So a client that comes once and never again costs no version for good.
        """
        return frozenset(
            member.version for member in self._members.values() if member.present or member.version >= recent
        )
