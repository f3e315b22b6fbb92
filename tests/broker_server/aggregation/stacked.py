"""Updates in memory, as `cohort.Blocks`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from broker_server.aggregation.cohort import Rows
from broker_server.aggregation.weighting import Report


@dataclass(frozen=True)
class Stacked:
    """``rows`` ``[clients, n] float32``, in blocks of ``width`` elements."""

    rows: Rows
    reports: Sequence[Report]
    width: int = 7

    @classmethod
    def of(cls, rows, weights=None) -> "Stacked":
        rows = np.asarray(rows, np.float32)
        weights = [1.0] * len(rows) if weights is None else weights
        return cls(rows, [Report(f"c{number}", weight=weight) for number, weight in enumerate(weights)])

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def read(self, members: Sequence[int] | None = None) -> Iterator[tuple[slice, Rows]]:
        chosen = range(len(self.rows)) if members is None else members
        for start in range(0, self.size, self.width):
            where = slice(start, min(start + self.width, self.size))
            yield where, self.rows[list(chosen), where].copy()
