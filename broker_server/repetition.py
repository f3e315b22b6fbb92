"""Chunks that clients ask to have published again: each once in a while, and not more at a time than a client can take.

A message of a few kilobytes may ask for hundreds of megabytes, and what is published again costs every server, broker
and subscriber. No I/O.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from edge_client.wire import transfer
from edge_client.wire.messages import BlobRef

_FRESH = 3.0
"""Seconds in which a chunk that was published again is not published once more."""


@dataclass
class Repetition:
    """What was published again of late; ``window`` is the number of chunks that one message may ask for."""

    window: int
    _fresh: "OrderedDict[tuple[bytes, int], float]" = field(default_factory=OrderedDict)
    """By blob and index, when it was published again; the oldest first."""

    def wanted(self, ref: BlobRef, indices: tuple[int, ...], now: float) -> tuple[int, ...]:
        """Those of the chunks that a client misses that may be published again at ``now``, each once."""
        while self._fresh and next(iter(self._fresh.values())) <= now - _FRESH:
            self._fresh.popitem(last=False)
        there = (index for index in dict.fromkeys(indices) if index < transfer.count(ref))
        return tuple(index for index in there if (ref.sha256, index) not in self._fresh)[: self.window]

    def publish(self, ref: BlobRef, indices: tuple[int, ...], now: float) -> None:
        """These, which are `wanted`, are published again."""
        self._fresh.update(((ref.sha256, index), now) for index in indices)

    def forget(self) -> None:
        """What was published may be lost: the connection was."""
        self._fresh.clear()
