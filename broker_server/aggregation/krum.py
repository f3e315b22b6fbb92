"""Krum and Multi-Krum: the updates that lie closest to their neighbours (Blanchard et al. 2017, arXiv 1703.02757)."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.cohort import CohortAggregator, Doubles, combination, square_distances
from broker_server.aggregation.weighting import Report

_COHORTS = 1000
"""Beyond so many updates any share below a half leaves enough of them."""


class Attackers(Options, frozen=True):
    """``attackers``: the share of the updates of a round that may be attackers'."""

    attackers: Annotated[float, Meta(ge=0, lt=0.5)] = 0.2


class Selection(Attackers, frozen=True):
    """``keep``: how many updates the mean is of; 0 is all but as many as there may be attackers."""

    keep: Annotated[int, Meta(ge=0, le=100_000)] = 0


def krum(attackers: float = 0.2) -> CohortAggregator:
    """The one update with the least score: the sum of squared distances to its ``n - f - 2`` closest neighbours.

    ``f = floor(attackers * n)``; ``n >= 2 f + 3`` updates are needed.
    """
    return _selection(attackers, 1)


def multi_krum(attackers: float = 0.2, keep: int = 0) -> CohortAggregator:
    """The mean of the ``keep`` updates with the least scores, ``n - f`` unless given."""
    return _selection(attackers, keep)


def fewest(options: Attackers) -> int:
    """From so many updates on, there are ``2 f + 3`` or more."""
    short = (count for count in range(_COHORTS, 2, -1) if count < 2 * _suspects(options.attackers, count) + 3)
    return next(short, 2) + 1


def _selection(attackers: float, keep: int) -> CohortAggregator:
    def choose(products: Doubles, reports: Sequence[Report]) -> Doubles:
        del reports
        count = len(products)
        suspects = _suspects(attackers, count)
        wanted = min(keep or count - suspects, count)
        # Those of equal score in ledger order, so that a replay chooses the same.
        chosen = np.argsort(scores(products, suspects), kind="stable")[:wanted]
        coefficients = np.zeros(count)
        coefficients[chosen] = 1.0 / wanted
        return coefficients

    return combination(choose, fewest(Attackers(attackers=attackers)))


def scores(products: Doubles, suspects: int) -> Doubles:
    """``[clients]``: Krum's score of each update, where ``suspects`` of them may be attackers'."""
    distances = square_distances(products)
    np.fill_diagonal(distances, np.inf)
    distances.sort(axis=1)
    total: Doubles = distances[:, : len(products) - suspects - 2].sum(axis=1)
    return total


def _suspects(attackers: float, count: int) -> int:
    return int(attackers * count + 1e-9)


KRUM = Algorithm(make=lambda options, local: krum(options.attackers), options=Attackers, fewest=fewest)
MULTI_KRUM = Algorithm(
    make=lambda options, local: multi_krum(options.attackers, options.keep), options=Selection, fewest=fewest
)
