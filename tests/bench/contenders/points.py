"""Rate and distortion: points that a codec reaches, and what it reaches in between."""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
"""Bits per parameter, headers included; energy of the noise over that of the vector (NMSE)."""
Floats = npt.NDArray[np.floating]

_LEAST = 1e-30


def noise(vector: Floats, decoded: Floats) -> float:
    """NMSE of ``decoded``."""
    energy = float(np.square(vector, dtype=np.float64).sum())
    return float(np.square(np.subtract(vector, decoded, dtype=np.float64)).sum()) / energy


def envelope(points: Iterable[Point], clear: float = 0.005) -> list[Point]:
    """A codec's best settings, ascending in bits and falling in NMSE.

    What lies above a line between two others, by ``clear`` of its NMSE, is left out: either of them taken in turn is
    better. Points on the line stay, as ``at`` interpolates logarithms.
    """
    hull: list[Point] = []
    for bits, nmse in sorted(points):
        if hull and nmse >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], (bits, nmse), clear):
            hull.pop()
        hull.append((bits, nmse))
    return hull


def at(points: list[Point], bits: float) -> float | None:
    """NMSE of an envelope at ``bits``, log-linear between its points; None where it does not reach."""
    if not points or not points[0][0] <= bits <= points[-1][0]:
        return None
    rates, logs = zip(*((rate, math.log(max(nmse, _LEAST))) for rate, nmse in points), strict=True)
    return math.exp(float(np.interp(bits, rates, logs)))


def needed(points: list[Point], nmse: float) -> float | None:
    """Bits at which an envelope has ``nmse``; None where it does not reach."""
    if not points or not points[-1][1] <= nmse <= points[0][1]:
        return None
    rates, logs = zip(*((rate, math.log(max(value, _LEAST))) for rate, value in reversed(points)), strict=True)
    return float(np.interp(math.log(max(nmse, _LEAST)), logs, rates))


def _above(left: Point, middle: Point, right: Point, clear: float) -> bool:
    """Whether ``middle`` is clearly above the line between its neighbours."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    return y1 > (1 + clear) * (y0 + (y2 - y0) * (x1 - x0) / (x2 - x0))
