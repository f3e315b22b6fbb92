"""QSGD (Alistarh, Grubic, Li, Tomioka, Vojnovic: "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", 2017): magnitudes over the norm are rounded at random to one of s levels, without bias.
"""

import numpy as np
import numpy.typing as npt

from contenders.points import Floats, Point, noise

BUCKETS = (0, 512)
"""Values that share a norm; 0 for all of them."""
LEVELS = tuple(4**k for k in range(7))
MOST = 16.0
"""Bits per parameter, beyond which nobody looks."""


def quantize(
    vector: Floats, levels: int, bucket: int, norm: str, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Integers ``[n]`` and the decoded vector; ``norm`` is that of a bucket: "l2" or, as in its code, "max"."""
    size = bucket or vector.size
    values = np.zeros(-(-vector.size // size) * size)
    values[: vector.size] = vector
    values = values.reshape(-1, size)
    norms = np.linalg.norm(values, axis=1) if norm == "l2" else np.abs(values).max(axis=1)
    scale = (np.where(norms > 0, norms, 1.0) / levels)[:, None]
    scaled = np.abs(values) / scale
    level = np.floor(scaled)
    level += rng.random(level.shape) < scaled - level
    level *= np.sign(values)
    return level.ravel()[: vector.size].astype(np.int64), (level * scale).ravel()[: vector.size]


def entropy_bits(levels: npt.NDArray[np.int64]) -> float:
    """What an ideal coder needs that knows how often each integer occurs."""
    count = np.bincount(levels - levels.min())
    count = count[count > 0]
    return float((count * np.log2(len(levels) / count)).sum())


def elias_bits(levels: npt.NDArray[np.int64]) -> float:
    """The paper's code: Elias omega for the distance of each non-zero and its magnitude, and a sign."""
    index = np.flatnonzero(levels)
    lengths = _omega(np.diff(index, prepend=-1)) + _omega(np.abs(levels[index]))
    return float(lengths + len(index))


def points(vector: Floats, seed: int = 0) -> list[Point]:
    """All levels, buckets and norms, each with the shorter of both codes; a norm is a float32."""
    rng = np.random.default_rng(seed)
    found = []
    for bucket in BUCKETS:
        for norm in ("l2", "max"):
            for levels in LEVELS:
                integers, decoded = quantize(vector, levels, bucket, norm, rng)
                header = 32 * -(-vector.size // (bucket or vector.size))
                bits = min(entropy_bits(integers), elias_bits(integers)) + header
                found.append((bits / vector.size, noise(vector, decoded)))
                if bits > MOST * vector.size:
                    break
    return found


def _omega(values: npt.NDArray[np.int64]) -> int:
    """Bits of the Elias omega codes of positive integers, together."""
    total, values = values.size, values.copy()
    while (left := values[values > 1]).size:
        lengths = np.floor(np.log2(left)).astype(np.int64)
        total += int((lengths + 1).sum())
        values = lengths
    return total
