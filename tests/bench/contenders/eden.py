"""EDEN (Vargaftik, Ben-Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher: "EDEN: Communication-Efficient and Robust
Distributed Mean Estimation for Federated Learning", ICML 2022): rotate at random, so that coordinates become normal,
then take the nearest of 2^b Lloyd-Max centroids; below one bit, send a random part of the coordinates.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from contenders.points import Floats, Point, noise

BITS = (1, 2, 3, 4)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
HEADER = 96
"""Bits: the scale, float32, and the seed."""


def density(x: float) -> float:
    """Of the standard normal distribution."""
    return math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def below(x: float) -> float:
    """Probability that a standard normal value is less."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@cache
def centroids(bits: int) -> tuple[float, ...]:
    """The ``2^bits`` values of least mean square error for a standard normal variable (Lloyd's iteration)."""
    values = list(np.linspace(-2, 2, 2**bits))
    for _ in range(5000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
        moved = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in pairwise(edges)]
        if max(abs(a - b) for a, b in zip(values, moved, strict=True)) < 1e-10:
            break
        values = moved
    return tuple(values)


def hadamard(vector: npt.NDArray[np.float64]) -> None:
    """The orthonormal Walsh-Hadamard transform, in place; the length is a power of two."""
    half = 1
    while half < vector.size:
        pairs = vector.reshape(-1, 2, half)
        total = pairs[:, 0] + pairs[:, 1]
        np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
        pairs[:, 0] = total
        half *= 2
    vector /= math.sqrt(vector.size)


def rotate(vector: Floats, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A random rotation that needs no padding: shuffled, then two overlapping transforms of a power of two."""
    rotated = rng.permutation(vector.astype(np.float64))
    block = 2 ** int(math.log2(vector.size))
    for part in (rotated[:block], rotated[-block:]):
        part *= rng.choice([-1.0, 1.0], block)
        hadamard(part)
    return rotated


def points(vector: Floats, seed: int = 0) -> list[Point]:
    """The better of the unbiased scale and that of least error, which is what error feedback wants.

    A rotation keeps distances: the error is that of the rotated coordinates.
    """
    rng = np.random.default_rng(seed)
    rotated = rotate(vector, rng)
    unit = math.sqrt(float(np.square(rotated).mean()))
    order = rng.permutation(vector.size)
    found = []
    for bits in BITS:
        values = np.array(centroids(bits))
        chosen = values[np.searchsorted((values[1:] + values[:-1]) / 2, rotated / unit)]
        for share in (SHARES if bits == 1 else ()) + (1.0,):
            count = max(round(share * vector.size), 1)
            sent = chosen
            if share < 1:
                sent = np.zeros_like(chosen)
                sent[order[:count]] = chosen[order[:count]]
            product = float(sent @ rotated)
            scales = (float(rotated @ rotated) / product, product / float(sent @ sent))
            error = min(noise(rotated, scale * sent) for scale in scales)
            found.append(((bits * count + HEADER) / vector.size, error))
    return found
