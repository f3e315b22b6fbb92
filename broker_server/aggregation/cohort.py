"""Cohort aggregation: rules that must see all updates of a task at once, some elements of them at a time.

Rules of two shapes cover the field. One looks at each element by itself (medians, trimmed means). The other makes a
linear combination of the updates whose coefficients follow from their inner products alone (Krum, geometric medians): a
first pass over the blocks adds up these products, ``[clients, clients]``, a second one combines what they choose.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector
from edge_client.errors import TrainingError

Rows = npt.NDArray[np.float32]
"""``[clients, elements] float32``: some elements of all updates, in ledger order."""
Doubles = npt.NDArray[np.float64]
_COLUMNS = 1 << 14
"""Elements that are widened to float64 at once, of all clients."""


class Blocks(Protocol):
    """All updates of a task, read some elements at a time, as often as asked."""

    @property
    def reports(self) -> Sequence[Report]:
        """What came with each update, in ledger order."""

    @property
    def size(self) -> int:
        """Elements of an update."""

    def read(self, members: Sequence[int] | None = None) -> Iterator[tuple[slice, Rows]]:
        """Where the elements are in the vector, and their rows; of these members alone, all unless given.

        Each update is multiplied with its report's ``scale``. Rows may be written to.
        """


@dataclass(frozen=True, slots=True)
class CohortAggregator:
    """A rule over all updates of a task."""

    finish: Callable[[Blocks], Vector]
    """``finish(blocks)``: the aggregate, ``[n_params] float32``.

    Raises:
        TrainingError: there are too few updates.
    """


def elementwise(rule: Callable[[Rows], Vector]) -> CohortAggregator:
    """``rule`` makes ``[elements]`` of ``[clients, elements] float32``, into which it may write."""

    def finish(blocks: Blocks) -> Vector:
        _expect(blocks, 1)
        aggregate = np.empty(blocks.size, np.float32)
        for where, rows in blocks.read():
            aggregate[where] = rule(rows)
        return aggregate

    return CohortAggregator(finish)


def combination(choose: Callable[[Doubles, Sequence[Report]], Doubles], fewest: int = 1) -> CohortAggregator:
    """``choose(products, reports)`` makes the coefficients, ``[clients]``, of ``[clients, clients]`` inner products."""

    def finish(blocks: Blocks) -> Vector:
        _expect(blocks, fewest)
        coefficients = choose(inner_products(blocks), blocks.reports)
        members = np.flatnonzero(coefficients)
        aggregate = np.zeros(blocks.size, np.float32)
        for where, rows in blocks.read(members.tolist()):
            part = aggregate[where]
            for columns, wide in _widened(rows):
                part[columns] = coefficients[members] @ wide
        return aggregate

    return CohortAggregator(finish)


def inner_products(blocks: Blocks) -> Doubles:
    """``[clients, clients] float64``: the inner product of each two updates."""
    count = len(blocks.reports)
    products = np.zeros((count, count))
    for _, rows in blocks.read():
        for _, wide in _widened(rows):
            products += wide @ wide.T
    return products


def square_distances(products: Doubles) -> Doubles:
    """``[clients, clients]``: the square of the distance of each two updates, from their inner products."""
    own = np.diag(products)
    return np.maximum(own[:, None] + own[None, :] - 2 * products, 0.0)


def _widened(rows: Rows) -> Iterator[tuple[slice, Doubles]]:
    for start in range(0, rows.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        yield columns, rows[:, columns].astype(np.float64)


def _expect(blocks: Blocks, fewest: int) -> None:
    if len(blocks.reports) < fewest:
        raise TrainingError(f"{len(blocks.reports)} updates came; the aggregation needs {fewest}: set round.minimum")
