"""What curves of accuracy say: rounds to a target, and what is left of noise."""

import math
from collections.abc import Sequence

WINDOW = 5
"""Rounds whose mean counts where single ones go up and down by points."""


def rounds_to(accuracy: Sequence[float], target: float) -> int | None:
    """The first round, from 1, after which the best accuracy so far is ``target`` or more; None where none is.

    McMahan et al. 2017 make their curves monotone in the same way, and interpolate between rounds: this is never less.
    """
    return next((number for number, value in enumerate(accuracy, 1) if value >= target), None)


def smoothed(accuracy: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of the last ``window`` rounds, of fewer at the beginning."""
    return [math.fsum(accuracy[max(0, end - window) : end]) / min(end, window) for end in range(1, len(accuracy) + 1)]


def mean(values: Sequence[float]) -> float:
    """Of some values; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))
