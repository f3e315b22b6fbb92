"""Each element by itself: the coordinate median and the trimmed mean (Yin et al. 2018, arXiv 1803.01498).

Both count all clients alike: a weight is a client's own claim.
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.cohort import CohortAggregator, Doubles, Rows, elementwise
from edge_client.codec.layout import Vector

_COLUMNS = 1 << 12
"""Elements that are sorted at once, of all clients: they stay in the cache."""


class Trimming(Options, frozen=True):
    """``trim``: the share of clients left out at each end of each element; as many attackers do no harm."""

    trim: Annotated[float, Meta(ge=0, lt=0.5)] = 0.2


def median() -> CohortAggregator:
    """The middle of each element's values, or the mean of the middle two."""
    return elementwise(lambda rows: _by_columns(rows, _middle))


def trimmed_mean(trim: float) -> CohortAggregator:
    """The mean of each element's values without ``floor(trim * clients)`` of the smallest and of the largest."""

    def kept(values: Rows) -> Doubles:
        out = int(trim * len(values[0]) + 1e-9)
        mean: Doubles = values[:, out : values.shape[1] - out].mean(axis=1, dtype=np.float64)
        return mean

    return elementwise(lambda rows: _by_columns(rows, kept))


def _middle(values: Rows) -> Doubles:
    count = values.shape[1]
    mean: Doubles = values[:, (count - 1) // 2 : count // 2 + 1].mean(axis=1, dtype=np.float64)
    return mean


def _by_columns(rows: Rows, rule: Callable[[Rows], Doubles]) -> Vector:
    """``rule`` over ``[elements, clients]``, each element's values sorted."""
    result = np.empty(rows.shape[1], np.float32)
    for start in range(0, rows.shape[1], _COLUMNS):
        values = np.ascontiguousarray(rows[:, start : start + _COLUMNS].T)
        values.sort(axis=1)
        result[start : start + _COLUMNS] = rule(values)
    return result


MEDIAN = Algorithm(make=lambda options, local: median(), every_element=True)
TRIMMED_MEAN = Algorithm(make=lambda options, local: trimmed_mean(options.trim), options=Trimming, every_element=True)
