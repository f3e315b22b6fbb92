"""Rate control: the step at which an encoder's bytes, or its distortion, are what was asked for."""

import math
from collections.abc import Callable

TOLERANCE = 0.03
"""How near to the goal is near enough, relative to it."""
_TRIES = 8
_NOTHING = 1e-30


def solve(
    measure: Callable[[float], float], goal: float, start: float, slope: float, bounds: tuple[float, float]
) -> None:
    """Measure at one step after another until ``goal`` is met; the last one measured is the nearest that was found.

    Args:
        measure: bytes or distortion at a step; about a power of the step.
        goal: what it should return, within ``TOLERANCE``.
        start: the step to begin with.
        slope: about how the logarithm of what is measured goes with that of the step.
        bounds: least and largest step.
    """
    low, high = bounds
    step = min(max(start, low), high)
    found: list[tuple[float, float]] = []
    while len(found) < _TRIES and step not in (at for at, _ in found):
        found.append((step, math.log(max(measure(step), _NOTHING) / goal)))
        if abs(found[-1][1]) <= TOLERANCE:
            return
        step = min(max(_next(found, slope), low), high)
    nearest, _ = min(found, key=lambda at: abs(at[1]))
    if nearest != found[-1][0]:
        measure(nearest)


def _next(found: list[tuple[float, float]], slope: float) -> float:
    """Where a line, in logarithms, through the last step and one before it misses nothing."""
    last, miss = math.log(found[-1][0]), found[-1][1]
    guess = -miss / slope
    others = [number for number, (_, other) in enumerate(found) if other * miss < 0]
    if others:
        # False position; the more often one end stays, the less it counts (Dowell and Jarratt 1971, "Illinois").
        weight = 0.5 ** (len(found) - 2 - others[-1])
        at, other = math.log(found[others[-1]][0]), weight * found[others[-1]][1]
        return math.exp(last + miss * (at - last) / (miss - other))
    if len(found) > 1:
        at, other = math.log(found[-2][0]), found[-2][1]
        if (other - miss) * (at - last) * slope > 0:
            # Far from the goal the line may be nearly flat.
            guess = max(-3 * abs(guess), min(3 * abs(guess), miss * (at - last) / (miss - other)))
    return math.exp(last + guess)
