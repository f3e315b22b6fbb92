"""Sums over samples, measured here or on the clients, turned into metrics."""

import contextlib
import math
from collections.abc import Iterable, Mapping

_NAMES = {"correct": "accuracy"}
"""What a sum is called once divided by the count; others keep their name."""
MEAN, WORST, SPREAD = "_mean", "_worst", "_spread"
"""What the fairness figures of a metric end with; see `fairness`."""
ANSWERS = "client_answers"
"""Beside the metrics of clients, how many of them answered."""
_TENTH = 10
BY_CLIENTS = ("client_", "personal_")
"""What metrics begin with that clients have measured: of the model of all, and of the one that each has for itself."""


def label(total: str) -> str:
    """The metric that comes of a sum: ``accuracy`` of ``correct``."""
    return _NAMES.get(total, total)


def names(sums: Iterable[str]) -> set[str]:
    """Metrics that may come of evaluations whose graph reports these sums, beside the loss; those of clients too."""
    plain = {"loss"} | {label(total) for total in sums}
    figures = ("", MEAN, WORST, SPREAD)
    return plain | {word + name + figure for word in BY_CLIENTS for name in plain for figure in figures}


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is the better one: not so for losses, errors and spreads."""
    return not ("loss" in metric or "error" in metric or metric.endswith(SPREAD))


def combine(sums: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Metrics over several evaluations: each sum over all of them, divided by ``count`` over all of them.

    ``correct`` becomes ``accuracy``; the other sums keep their names, ``loss`` among them. Only sums that every
    evaluation brought are there. The order does not matter. Nothing counted gives no metrics: an empty dict.
    """
    parts = list(sums)
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    totals = {name: exact_sum(part[name] for part in parts) for name in sorted(names)}
    count = totals.pop("count", 0.0)
    if not count > 0:
        return {}
    return {label(name): total / count for name, total in totals.items()}


def fairness(metric: str, values: Iterable[float]) -> dict[str, float]:
    """How a metric is spread over clients, each of whom counts once, whatever its samples.

    ``<metric>_mean`` is the mean over clients; ``_worst`` the mean of the worst tenth of them, rounded down and at
    least one: the lowest values, the highest of losses and errors (as Li et al. 2020, "Fair Resource Allocation in
    Federated Learning"); ``_spread`` the standard deviation over clients. The order does not matter, to the last bit.
    Nobody gives no figures.
    """
    ordered = sorted(values, reverse=not higher_is_better(metric))
    if not ordered:
        return {}
    mean = exact_sum(ordered) / len(ordered)
    worst = ordered[: max(1, len(ordered) // _TENTH)]
    apart = exact_sum((value - mean) * (value - mean) for value in ordered) / len(ordered)
    return {metric + MEAN: mean, metric + WORST: exact_sum(worst) / len(worst), metric + SPREAD: math.sqrt(apart)}


def exact_sum(values: Iterable[float]) -> float:
    """The sum, rounded once: the order of arrival changes no bit."""
    numbers = sorted(values)
    # fsum refuses opposite infinities, which make NaN, and sums that are too large.
    with contextlib.suppress(OverflowError, ValueError):
        return math.fsum(numbers)
    return sum(numbers)
