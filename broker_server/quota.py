"""How much is asked for certificates, before anything is looked at: token buckets for each user, and for all of a kind.

All claims share one because any of them may write in the name of any other: whoever has one cannot be told from the
rest. He may write in the names of devices too, and make some up: those that renew share another one, so that neither
kind holds up the other.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from edge_client.wire import enrolment as wire

_USERS = 10_000
"""Users that are remembered."""


@dataclass
class _Bucket:
    left: float
    at: float

    def fill(self, most: float, rate: float, now: float) -> float:
        self.left = min(most, self.left + max(0.0, now - self.at) * rate)
        self.at = now
        return self.left


@dataclass
class Quota:
    """``burst`` asks of one user at once, then ``rate`` a second; ``all_burst`` and ``all_rate`` for all of a kind."""

    burst: float = 20.0
    rate: float = 2.0
    all_burst: float = 500.0
    all_rate: float = 100.0
    _users: "OrderedDict[str, _Bucket]" = field(init=False, default_factory=OrderedDict)
    _kinds: dict[bool, _Bucket] = field(init=False, default_factory=dict)
    """Of claims, and of all others."""

    def takes(self, user: str, now: float) -> bool:
        """Whether one more message of this user is looked at, at monotonic time ``now``; it is counted then."""
        own = self._users.setdefault(user, _Bucket(self.burst, now))
        self._users.move_to_end(user)
        if len(self._users) > _USERS:
            self._users.popitem(last=False)
        if own.fill(self.burst, self.rate, now) < 1.0:
            return False
        kind = self._kinds.setdefault(user.startswith(wire.CLAIMS), _Bucket(self.all_burst, now))
        if kind.fill(self.all_burst, self.all_rate, now) < 1.0:
            return False
        kind.left -= 1.0
        own.left -= 1.0
        return True
