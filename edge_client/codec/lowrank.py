"""The low-rank part of an update: a few directions that hold most of a matrix's energy, as quantized factors.

What a client learns in one task is a sum of few gradients, each a product of what came in and what went wrong; most of
a weight matrix's change therefore lies in a handful of singular directions. Told as such, a direction of ``[m, n]``
costs ``m + n`` numbers, not ``m * n`` (Vogels et al. 2019, PowerSGD, arXiv 1905.13727; here without a shared basis).

A matrix ``M = U S V'`` is told as ``A = U S`` and ``B = V S``. An error of ``e`` in any one of their elements costs the
product ``A S^-1 B'`` about ``e^2``, just as in an element told by itself: reverse water-filling gives all of them the
same step. ``A`` is quantized first and ``B`` is then fitted to it, which mends most of what quantizing ``A`` broke.

Element ``(j, k)`` of the product is, in float64 and in steps, ``sum_i a[j, i] * c[k, i]``, where ``a`` are the levels
of A, ``c[k, i] = rint(2^q * value(b[k, i]) / norm_i) / 2^q``, ``value`` adds the level's centroid, and ``norm_i`` is
the integer part of the root of ``sum_j a[j, i]^2``, at least 1. ``q`` is the integer that puts the largest
``|2^q * c|`` between 2^23 and 2^24: every sum is then exact, and no order of summation, thread or processor changes a
bit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_client.codec.quantize import centroids, levels, reconstruct

Matrix = npt.NDArray[np.float32]
Coefficients = npt.NDArray[np.float64]
Levels = npt.NDArray[np.int32]

RANK_LIMIT = 64
"""Most directions of one matrix."""
LEVEL_LIMIT = 2**22
"""Largest magnitude of a factor's level; with ``RANK_LIMIT`` and ``_C_BITS`` it keeps sums below 2^53."""
_ENERGY_LIMIT = 2.0**52
_SIDE = 8
"""A matrix with a shorter side is told by its elements."""
_DEAD_ZONE = 0.6
_WORTH = 0.1
"""Energy, in squared steps, that a bit must bring: what a bit brings elsewhere."""
_PIECE = 1 << 16
"""Elements of the product that are made at once: they stay in the cache."""
_C_BITS = 24


@dataclass(frozen=True)
class Factors:
    """``left`` ``[m, r]`` and ``right`` ``[n, r]``, int32 levels; ``offsets`` as in `quantize.Quantized`, of right."""

    left: Levels
    right: Levels
    offsets: tuple[int, int, int]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.left.shape[1])

    @property
    def exact(self) -> bool:
        """Whether all sums of the product stay below 2^53, and those of the squares of ``left`` too."""
        highest = max(int(np.abs(side).max(initial=0)) for side in (self.left, self.right))
        # int32 does not hold the magnitude of its lowest value.
        if not 0 <= highest <= LEVEL_LIMIT:
            return False
        left = self.left.astype(np.float64)
        return bool((np.einsum("ji,ji->i", left, left) <= _ENERGY_LIMIT).all())

    def product(self, step: float) -> Iterator[tuple[slice, Matrix]]:
        """The matrix ``[m, n]``, some rows at a time, the same bits on every platform."""
        left = self.left.astype(np.float64)
        norms = np.sqrt(np.einsum("ji,ji->i", left, left))
        right = reconstruct(self.right, self.offsets)
        right /= np.maximum(np.floor(norms), 1.0)
        highest = float(np.abs(right).max(initial=0.0))
        shift = _C_BITS - math.frexp(highest)[1]
        right *= math.ldexp(1.0, shift)
        np.rint(right, out=right)
        scale = math.ldexp(step, -shift)
        rows = max(1, _PIECE // max(1, len(right)))
        for at in range(0, len(left), rows):
            piece = left[at : at + rows] @ right.T
            piece *= scale
            with np.errstate(over="ignore"):
                yield slice(at, at + rows), piece.astype(np.float32)


@dataclass(frozen=True)
class Sketch:
    """The leading directions of a matrix: ``left = U S`` ``[m, k]``, ``right = V S`` ``[n, k]``, float64."""

    left: Coefficients
    right: Coefficients


def suits(shape: tuple[int, int]) -> bool:
    """Whether a matrix may be told by factors."""
    return min(shape) >= _SIDE


def most(shape: tuple[int, int]) -> int:
    """The highest rank that a matrix may be told with."""
    return min(RANK_LIMIT, min(shape) // 2)


def sketch(matrix: Matrix, floor: float) -> Sketch:
    """Find the directions of ``matrix`` (``[m, n] float32``) whose singular values are above ``floor``.

    Randomized range finder (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) from a fixed seed, with more vectors
    until what it finds falls below the floor or the limit is reached.
    """
    m, n = matrix.shape
    limit = most((m, n))
    count = min(16, limit)
    while True:
        draws = np.random.default_rng(0).standard_normal((n, count), np.float32)
        basis, _ = np.linalg.qr(matrix @ draws)
        # One power iteration: without it, updates of the tests' models cost 14 % more bytes; a second saves 1 %.
        turned, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ turned)
        projected = matrix.T @ basis
        right, values, turn = np.linalg.svd(projected.astype(np.float64), full_matrices=False)
        if count >= limit or values[-1] < floor:
            break
        count = min(2 * count, limit)
    keep = int(np.count_nonzero(values > floor))
    left = basis.astype(np.float64) @ turn.T[:, :keep]
    return Sketch(left * values[:keep], right[:, :keep] * values[:keep])


def factorize(matrix: Matrix, found: Sketch, step: float) -> Factors | None:
    """Quantize those of a matrix's directions that are worth their bits; None where none is."""
    sides = [side / step for side in (found.left, found.right)]
    left, right = (levels(side, _DEAD_ZONE) for side in sides)
    energy = np.einsum("ji,ji->i", sides[0], sides[0])
    gain = energy.copy()
    for side, level in zip(sides, (left, right), strict=True):
        side -= level
        gain -= np.einsum("ji,ji->i", side, side)
    kept = np.flatnonzero(gain > _WORTH * (_bits(left) + _bits(right)))
    if not len(kept) or energy.max() > LEVEL_LIMIT**2:
        return None
    left = left[:, kept]
    # Alternating least squares; once more saves another percent.
    right = levels(_fit(matrix.T, left, step), _DEAD_ZONE)
    left = levels(_fit(matrix, right, step), _DEAD_ZONE)
    fitted = _fit(matrix.T, left, step)
    right = levels(fitted, _DEAD_ZONE)
    factors = Factors(left, right, centroids(fitted, right))
    return factors if factors.exact else None


def _fit(matrix: Matrix, given: Levels, step: float) -> Coefficients:
    """The other factor of ``matrix`` ``[n, m]`` in steps, ``[n, r]``, for the levels ``[m, r]`` of one."""
    wide = given.astype(np.float64)
    gram = wide.T @ wide
    norms = np.maximum(np.floor(np.sqrt(np.diag(gram))), 1.0)
    sums = (matrix @ given.astype(np.float32)).astype(np.float64)
    fitted: Coefficients = np.linalg.lstsq(gram, sums.T, rcond=None)[0].T * (norms / step)
    # Directions that quantization made nearly equal have no bounded fit.
    np.clip(fitted, -LEVEL_LIMIT, LEVEL_LIMIT, out=fitted)
    return fitted


def _bits(coefficients: Levels) -> Coefficients:
    """About what each column costs: magnitudes that are geometric about a mean of row times column, and signs."""
    magnitude = np.abs(coefficients).astype(np.float64)
    columns, rows = magnitude.sum(axis=0), magnitude.sum(axis=1, keepdims=True)
    mean = np.maximum(rows * columns / max(columns.sum(), 1.0), 1e-9)
    bits: Coefficients = (np.log2(1 + mean) + magnitude * np.log2(1 + 1 / mean) + (magnitude > 0)).sum(axis=0)
    return bits
