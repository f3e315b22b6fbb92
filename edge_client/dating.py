"""The dates of offers against a clock that may have been set back, or never set, and what is remembered of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from edge_client import events as e
from edge_client.errors import TrustError
from edge_client.wire import messages as m
from edge_client.wire.envelope import Stamp
from edge_client.wire.voice import Member

_CLOCK_ERROR = 3600.0
"""Seconds that clocks may differ by and be taken for right."""


@dataclass
class Dating:
    """What time it is, as far as a session can know."""

    voice: Member
    wall: float = 0.0
    """What the clock shows, seconds since 1970."""
    _slow: bool = False
    """Whether the log says that the clock cannot be right."""
    _witnessed: Stamp = field(init=False)

    def __post_init__(self) -> None:
        self._witnessed = self.voice.newest

    def late(self, offer: m.Offer) -> float:
        """Seconds since an offer has expired; 0 where it holds, or has no date."""
        time = max(self.wall, self.voice.passed)
        return max(0.0, time - offer.expires) if offer.issued else 0.0

    def check(self, offer: m.Offer) -> Iterator[e.Action]:
        """Refuse an offer that has expired, say once where that cannot be told, and remember the newest one durably.

        Raises:
            TrustError: it has.
        """
        if not offer.issued:
            return
        if late := self.late(offer):
            raise TrustError(f"an offer that expired {late:.0f} s ago: does its server live, and is the clock right?")
        if self.wall < offer.issued - _CLOCK_ERROR and not self._slow:
            self._slow = True
            slow = offer.issued - self.wall
            yield e.Log(f"the clock is {slow:.0f} s behind the server's: whether offers have expired cannot be told")
        if self.voice.newest != self._witnessed:
            self._witnessed = self.voice.newest
            yield e.Witness(self._witnessed, offer.issued)
