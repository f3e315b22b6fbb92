"""Sums over samples, measured here or on the clients, turned into metrics."""

import math
from collections.abc import Iterable, Mapping

_NAMES = {"correct": "accuracy"}
"""What a sum is called once divided by the count; others keep their name."""


def names(sums: Iterable[str]) -> set[str]:
    """Metrics that come of an evaluation whose graph reports these sums, beside the loss."""
    return {"loss"} | {_NAMES.get(name, name) for name in sums}


def combine(sums: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Metrics over several evaluations: each sum over all of them, divided by ``count`` over all of them.

    ``correct`` becomes ``accuracy``; the other sums keep their names, ``loss`` among them. Only sums that every
    evaluation brought are there. The order does not matter. Nothing counted gives no metrics: an empty dict.
    """
    parts = list(sums)
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    totals = {name: _sum(part[name] for part in parts) for name in sorted(names)}
    count = totals.pop("count", 0.0)
    if not count > 0:
        return {}
    return {_NAMES.get(name, name): total / count for name, total in totals.items()}


def _sum(values: Iterable[float]) -> float:
    numbers = list(values)
    # fsum is exact, so that the order of arrival changes no bit; it refuses opposite infinities, which make NaN.
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)
