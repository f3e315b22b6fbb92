"""From floats to integer levels and back: step, dead zone, centroid reconstruction.

A value ``x`` becomes 0 inside the dead zone, ``|x| < dead_zone * step``, else
``sign(x) * floor(|x| / step + 1 - dead_zone)``. The decoder puts a level where the encoder's values of that level lie
on average (their centroid), not at the middle of the interval: with the peaked distributions of model updates that
lowers the distortion, for three bytes (Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian
random variables").
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_client.codec.integers import pieces
from edge_client.codec.layout import Vector

LEVEL_LIMIT = 2**22
"""Largest magnitude of a level that the encoder produces; finer steps are not told apart in float32 anyway."""
CENTROIDS = 3
"""Levels of magnitude 1, 2, and all larger ones have a centroid each."""
OFFSET_UNITS = 128
"""Centroid offsets are integers in units of ``step / 128``."""

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Quantized:
    """A quantized vector.

    ``step``: distance of two levels, finite and positive; ``offsets``: for magnitude 1, 2 and above, how far the
    centroid lies from the level, away from zero, in ``step / 128``, -128 .. 127; ``index`` ``[m] int64``: places of
    the non-zeros; ``level`` ``[m] int32``: their values, none zero.
    """

    step: float
    offsets: tuple[int, int, int]
    index: npt.NDArray[np.int64]
    level: npt.NDArray[np.int32]

    def values(self) -> Vector:
        """The reconstructed non-zeros, ``[m] float32``, the same bits on every platform.

        Level and centroid are exact in float64; their product with the step is rounded once to float64, once to
        float32, and saturates at the largest float32.
        """
        value = reconstruct(self.level, self.offsets)
        value *= self.step
        np.clip(value, -_LARGEST, _LARGEST, out=value)
        return value.astype(np.float32)

    def add(self, vector: Vector, sign: float = 1.0) -> None:
        """Add the reconstructed values, or their negatives, to a whole vector."""
        for piece in pieces(0, len(self.index)):
            values = Quantized(self.step, self.offsets, self.index[piece], self.level[piece]).values()
            vector[self.index[piece]] += np.float32(sign) * values

    def scatter(self, size: int) -> Vector:
        """The whole reconstructed vector, ``[size] float32``."""
        vector = np.zeros(size, np.float32)
        vector[self.index] = self.values()
        return vector


def peak(vector: Vector) -> float:
    """Largest magnitude in ``vector`` (``[n] float32``), NaN if it holds one, 0 if it is empty."""
    if vector.size == 0:
        return 0.0
    # Two reductions without a copy; both carry NaN through.
    return float(np.maximum(vector.max(), -vector.min()))


def rms(vector: npt.NDArray[np.floating]) -> float:
    """Root of the mean square; ``vector`` must not be empty."""
    # Blocks bound the rounding error of float32 sums; einsum, unlike dot, starts no threads of its own.
    block = 1 << 16
    total = sum(
        float(np.einsum("i,i->", vector[at : at + block], vector[at : at + block]))
        for at in range(0, len(vector), block)
    )
    return float(np.sqrt(total / len(vector)))


def quantize(vector: Vector, step: float, dead_zone: float) -> Quantized:
    """Quantize a finite vector.

    Args:
        vector: ``[n] float32``.
        step: distance of two levels, above 0, and such that no level passes ``LEVEL_LIMIT``.
        dead_zone: in steps, 0.5 to 1; 0.6 to 0.75 is best for the rates of interest (an entropy-coded uniform
            quantizer).
    """
    values: npt.NDArray[np.floating] = vector
    if not 1e-15 < step < 1e15:
        values = vector.astype(np.float64)  # the edge would leave float32's range
    # Comparing both ways reads the vector twice but writes only masks: cheaper than a copy of magnitudes.
    edge = values.dtype.type(dead_zone * step)
    index = np.flatnonzero((values >= edge) | (values <= -edge))
    level = np.empty(len(index), np.int32)
    beyond = np.zeros((2, CENTROIDS + 1))
    for piece in pieces(0, len(index)):
        scaled = values[index[piece]].astype(np.float64) / step
        level[piece] = levels(scaled, dead_zone)
        beyond += _beyond(scaled, level[piece])
    return Quantized(step, _offsets(beyond), index, level)


def levels(scaled: npt.NDArray[np.float64], dead_zone: float) -> npt.NDArray[np.int32]:
    """The level of each value that is given in steps, zeros included; any shape."""
    # A hair more: what an edge that is rounded to float32 lets through is a level all the same.
    moved = np.copysign(1.0 - dead_zone + 1e-6, scaled)
    moved += scaled
    return moved.astype(np.int32)


def centroids(scaled: npt.NDArray[np.float64], level: npt.NDArray[np.int32]) -> tuple[int, int, int]:
    """``Quantized.offsets`` for values in steps and their levels, both of one shape."""
    return _offsets(_beyond(scaled.ravel(), level.ravel()))


def _beyond(scaled: npt.NDArray[np.float64], level: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """How many there are of each magnitude, and how far they lie beyond their level in all: ``[2, CENTROIDS + 1]``."""
    magnitude = np.abs(level)
    beyond = np.abs(scaled) - magnitude
    classes = np.minimum(magnitude, CENTROIDS)
    return np.stack([np.bincount(classes, weights, CENTROIDS + 1) for weights in (None, beyond)])


def _offsets(beyond: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    counts, sums = beyond[:, 1:]
    units = np.rint(sums / np.maximum(counts, 1) * OFFSET_UNITS)
    first, second, more = np.clip(units, -OFFSET_UNITS, OFFSET_UNITS - 1).astype(int).tolist()
    return first, second, more


def reconstruct(level: npt.NDArray[np.int32], offsets: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Where levels lie, in steps (float64, exact), each moved away from zero by its magnitude's centroid."""
    outward = np.array((0, *offsets), np.float64) / OFFSET_UNITS
    table = np.concatenate((-outward[:0:-1], outward))
    value: npt.NDArray[np.float64] = table[np.clip(level, -CENTROIDS, CENTROIDS) + CENTROIDS]
    value += level
    return value
