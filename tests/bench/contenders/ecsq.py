"""Theory: the entropy-coded scalar quantizer (ECSQ) of a standard normal source.

A uniform quantizer with a dead zone and centroids is optimal among scalar quantizers within less than can be measured
at all rates (Sullivan: "Efficient scalar quantization of exponential and Laplacian random variables", 1996; Gish and
Pierce: "Asymptotically efficient quantizing", 1968). Probabilities and moments of its cells are closed forms.
"""

import math
from functools import cache

import numpy as np

from contenders.eden import below, density
from contenders.points import Point, envelope

STEPS = np.geomspace(0.02, 6, 240)
EDGES = np.arange(0.5, 1.51, 0.05)
"""Of the dead zone, in steps."""
_TAIL = 9.0


def quantizer(step: float, edge: float) -> Point:
    """Bits and NMSE: zero below ``edge`` steps, cells one ``step`` wide from there, centroids in all of them."""
    tops = np.arange(edge * step, _TAIL + step, step)
    above = np.array([below(-top) for top in tops])
    heights = np.array([density(top) for top in tops])
    mass = np.append(above[:-1] - above[1:], above[-1])
    moment = np.append(heights[:-1] - heights[1:], heights[-1])
    kept = mass > 0
    mass, moment = mass[kept], moment[kept]
    zero = 1 - 2 * float(mass.sum())
    bits = -2 * float((mass * np.log2(mass)).sum()) - zero * math.log2(zero)
    return bits, 1 - 2 * float((moment**2 / mass).sum())


@cache
def gaussian() -> tuple[Point, ...]:
    """The best of all steps and dead zones, as an envelope."""
    every = (quantizer(float(step), float(edge)) for step in STEPS for edge in EDGES)
    return tuple(envelope(every, clear=0))
