"""How clients behave: how much they say, what is wrong with it, and who is not listened to for a while.

Two token buckets for each client, of messages and of bytes, hold what it may say without being asked; chunks that were
asked for are free, the credits bound them. What breaks the wire contract or is not believed is a strike, and strikes
are forgiven with time. Too many of them mute the client: what it says is dropped before anything else is done about it.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from broker_server.config import Limits

_BURST = 4.0
"""Seconds of its rate that a client may say at once."""
_EXCESS = 0.05
"""Strikes for a message more than the rate allows."""
_FORGIVEN = 1 / 60
"""Strikes a second."""
_DAMAGE = 0.5
"""Strikes for an update that came damaged."""
_DOUBLINGS = 6
"""A client that is muted again and again is muted for twice as long, so often."""
_CALM = 3600.0
"""Seconds without a mute after which one of them is forgotten."""
_RECORDS = 65_536
"""Clients that are remembered: without access rules at the broker anybody can make up names."""
_TWINS = 3
"""Signs of a second device with the same name after which it is believed in: one may be a message that was late."""


class Mute(NamedTuple):
    """A client is not listened to."""

    client: str
    reason: str
    """What it did last."""
    seconds: float


@dataclass(slots=True)
class _Record:
    at: float
    messages: float
    """How many it may say now."""
    size: float
    """How many bytes."""
    strikes: float = 0.0
    muted: float = 0.0
    """Until when."""
    mutes: int = 0
    boot: bytes = b""
    old_boots: tuple[bytes, ...] = ()
    twins: int = 0


@dataclass
class Conduct:
    """What is known of how clients behave; all times are monotonic seconds."""

    limits: Limits
    window: int = 0
    """Chunks of a client that may come late, and unasked for, at once."""
    _records: "OrderedDict[str, _Record]" = field(default_factory=OrderedDict)

    def muted(self, client: str, now: float) -> bool:
        """Whether this client is not listened to now."""
        record = self._records.get(client)
        return record is not None and now < record.muted

    def spend(self, client: str, size: int, now: float) -> Mute | bool:
        """A client says something of ``size`` bytes unasked: whether it may, or that it is muted from now on."""
        record = self._record(client, now)
        if record.messages >= 1 and record.size >= size:
            record.messages -= 1
            record.size -= size
            return True
        reason = f"what is said in the name of {client} is more than [limits] allows"
        return self._strike(client, record, _EXCESS, reason, now) or False

    def afford(self, client: str, most: int, size: int, now: float) -> int:
        """How many things of ``size`` bytes, at most ``most``, a client may cause to be sent; they are charged to it.

        A client that has caused nothing for long may cause one, however large.
        """
        record = self._record(client, now)
        many = int(max(0.0, record.size) // size) or int(record.size >= self._most[1])
        record.size -= min(most, many) * size
        return min(most, many)

    def strike(self, client: str, reason: str, now: float) -> Mute | None:
        """A client did something wrong; it is muted where that was once too often."""
        return self._strike(client, self._record(client, now), 1.0, reason, now)

    def damaged(self, client: str, now: float) -> Mute | None:
        """What came was not what a client has announced; it counts less, for anybody between may have damaged it."""
        reason = f"what is sent in the name of {client} comes damaged"
        return self._strike(client, self._record(client, now), _DAMAGE, reason, now)

    def forgive(self, client: str) -> None:
        """Listen to a client again, and know nothing of it: its name belongs to another key now."""
        self._records.pop(client, None)

    def greeted(self, client: str, boot: bytes, now: float) -> bool:
        """A client has said hello; whether there turn out to be two of it.

        The boot nonce of an earlier life that comes back is a sign of it.
        """
        record = self._record(client, now)
        if record.boot == boot:
            return False
        back = boot in record.old_boots
        record.old_boots = (*record.old_boots[-3:], record.boot)
        record.boot = boot
        return back and self._twin(record)

    def twin(self, client: str, now: float) -> bool:
        """What came can only be another device's of the same name; whether it is believed now, for the first time."""
        return self._twin(self._record(client, now))

    def _twin(self, record: _Record) -> bool:
        record.twins += 1
        return record.twins == _TWINS

    def _strike(self, client: str, record: _Record, weight: float, reason: str, now: float) -> Mute | None:
        record.strikes += weight
        if record.strikes < self.limits.strikes:
            return None
        calm = max(0, int((now - record.muted) // _CALM))
        record.mutes = max(0, record.mutes - calm)
        seconds = self.limits.mute_seconds * 2.0**record.mutes
        record.strikes, record.mutes, record.muted = 0.0, min(_DOUBLINGS, record.mutes + 1), now + seconds
        return Mute(client, reason, seconds)

    def _record(self, client: str, now: float) -> _Record:
        most, size = self._most
        record = self._records.get(client)
        if record is None:
            record = self._records[client] = _Record(now, most, size)
            if len(self._records) > _RECORDS:
                self._records.popitem(last=False)
            return record
        self._records.move_to_end(client)
        passed = max(0.0, now - record.at)
        record.at = now
        record.messages = min(most, record.messages + passed * self.limits.messages)
        record.size = min(size, record.size + passed * self.limits.bytes)
        record.strikes = max(0.0, record.strikes - passed * _FORGIVEN)
        return record

    @property
    def _most(self) -> tuple[float, float]:
        """Messages and bytes that a client may say at once."""
        return max(_BURST * self.limits.messages, 2.0 * self.window), _BURST * self.limits.bytes
