"""What results of several clients come to: how many, of how many samples, and the metrics that they report."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from broker_server.metrics import combine


@dataclass
class Tally:
    """Results so far."""

    results: int = 0
    samples: int = 0
    _sums: dict[str, float] = field(default_factory=dict)

    def add(self, samples: int, scalars: Mapping[str, float]) -> None:
        """One more result."""
        self.results += 1
        self.samples += samples
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def metrics(self, prefix: str) -> dict[str, float]:
        """Metrics over all results, from the sums that they report."""
        sums = {name.removeprefix("sum."): total for name, total in self._sums.items() if name.startswith("sum.")}
        return {prefix + name: value for name, value in combine([sums]).items()}
