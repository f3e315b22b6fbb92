"""Rate control: the step at which an encoder's bytes, or its distortion, are what was asked for."""

import math
from collections.abc import Callable

TOLERANCE = 0.03
"""How near to the goal is near enough, relative to it."""
_TRIES = 8


def solve(
    measure: Callable[[float], float], goal: float, start: float, slope: float, bounds: tuple[float, float]
) -> None:
    """Measure at one step after another until ``goal`` is met; the last one measured is the nearest that was found.

    Args:
        measure: bytes or distortion at a step, positive; about a power of the step.
        goal: what it should return, within ``TOLERANCE``.
        start: the step to begin with.
        slope: about how the logarithm of what is measured goes with that of the step.
        bounds: least and largest step.
    """
    low, high = bounds
    found: list[tuple[float, float]] = []
    step = min(max(start, low), high)
    for _ in range(_TRIES):
        miss = math.log(measure(step) / goal)
        if abs(miss) <= TOLERANCE:
            return
        found.append((math.log(step), miss))
        following = min(max(math.exp(_next(found, slope)), low), high)
        if following in (step, *(math.exp(at) for at, _ in found)):
            break
        step = following
    nearest = math.exp(min(found, key=lambda at: abs(at[1]))[0])
    if nearest != step or len(found) > 1:
        measure(nearest)


def _next(found: list[tuple[float, float]], slope: float) -> float:
    """Where a line through the two best points misses nothing; between the points on both sides where there are."""
    above = min((at for at in found if at[1] > 0), key=lambda at: at[1], default=None)
    below = max((at for at in found if at[1] < 0), key=lambda at: at[1], default=None)
    if above and below:
        first, second = above, below
    elif len(found) > 1:
        first, second = found[-2:]
    else:
        return found[0][0] - found[0][1] / slope
    rise = second[1] - first[1]
    if rise * (second[0] - first[0]) * slope <= 0:
        return found[-1][0] - found[-1][1] / slope
    return first[0] - first[1] * (second[0] - first[0]) / rise
