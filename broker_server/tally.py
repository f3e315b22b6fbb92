"""What results of several clients come to: how many, of how many samples, and the metrics that they report.

A client reports sums by name: ``sum.loss``, ``sum.correct``, and ``sum.count`` to divide them by. With a word before
them they are of something else, and metrics of their own: ``personal.sum.correct`` becomes ``personal_accuracy``.
"""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from broker_server.metrics import exact_sum, fairness, label

_MARK = ".sum."


@dataclass(slots=True)
class _Told:
    """One sum of each client that reported it, and the count to divide it by; some 16 bytes a client."""

    totals: "array[float]" = field(default_factory=lambda: array("d"))
    counts: "array[float]" = field(default_factory=lambda: array("d"))

    def shares(self) -> Iterator[float]:
        """The metric of each client."""
        return (total / count for total, count in zip(self.totals, self.counts, strict=True))


@dataclass
class Tally:
    """Results so far; their order changes no bit of what they come to."""

    results: int = 0
    samples: int = 0
    _told: dict[tuple[str, str], _Told] = field(default_factory=dict)
    """By what is measured (empty, or a word) and the name of the sum."""

    def add(self, samples: int, scalars: Mapping[str, float]) -> None:
        """One more result."""
        self.results += 1
        self.samples += samples
        for name, value in scalars.items():
            before, mark, total = f".{name}".partition(_MARK)
            count = scalars.get(f"{before}{_MARK}count"[1:], 0.0)
            # Who leaves a sum out, or counts nothing, is not counted for it.
            if mark and total != "count" and count > 0:
                told = self._told.setdefault((before[1:], total), _Told())
                told.totals.append(value)
                told.counts.append(count)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means over all samples of all results; ``prefix`` is for those that have no word of their own."""
        return {
            _named(word, prefix) + label(total): exact_sum(told.totals) / exact_sum(told.counts)
            for (word, total), told in self._told.items()
        }

    def fairness(self, prefix: str) -> dict[str, float]:
        """How the same metrics are spread over clients; see `broker_server.metrics.fairness`."""
        found: dict[str, float] = {}
        for (word, total), told in self._told.items():
            found |= fairness(_named(word, prefix) + label(total), told.shares())
        return found


def _named(word: str, prefix: str) -> str:
    return f"{word}_" if word else prefix
