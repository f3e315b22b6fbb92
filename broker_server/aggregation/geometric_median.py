"""RFA: the geometric median of updates, by the smoothed Weiszfeld algorithm (Pillutla et al. 2022, arXiv 1912.13445).

The point ``z`` that minimizes ``sum(w_k * ||z - update_k||)``. All iterates are combinations of the updates, so their
distances follow from the updates' inner products: iterations cost nothing beside reading the updates twice.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.cohort import CohortAggregator, Doubles, combination
from broker_server.aggregation.weighting import Report


class Weiszfeld(Options, frozen=True):
    """How long, and how exactly, the median is looked for.

    ``iterations``: at most so many; ``tolerance``: of the weighted distance, as a share of it, below which an iteration
    is the last; ``smoothing``: distances below it count as it (the paper's nu).
    """

    iterations: Annotated[int, Meta(ge=1, le=10_000)] = 100
    tolerance: Annotated[float, Meta(ge=0, le=1)] = 1e-8
    smoothing: Annotated[float, Meta(gt=0, le=1e9)] = 1e-6


def geometric_median(options: Weiszfeld) -> CohortAggregator:
    """The smoothed geometric median, each update by its weight; it starts from their weighted mean."""

    def choose(products: Doubles, reports: Sequence[Report]) -> Doubles:
        weights = np.array([report.weight for report in reports], np.float64)
        weights /= weights.sum()
        coefficients, before = weights, np.inf
        for _ in range(options.iterations):
            distances = np.maximum(_distances(products, coefficients), options.smoothing)
            total = float(weights @ distances)
            if before - total <= options.tolerance * total:
                break
            before = total
            coefficients = weights / distances
            coefficients /= coefficients.sum()
        return coefficients

    return combination(choose)


def _distances(products: Doubles, coefficients: Doubles) -> Doubles:
    """``[clients]``: how far each update is from the combination of all with these coefficients."""
    along = products @ coefficients
    return np.sqrt(np.maximum(np.diag(products) - 2 * along + float(coefficients @ along), 0.0))


ALGORITHM = Algorithm(make=lambda options, local: geometric_median(options), options=Weiszfeld)
