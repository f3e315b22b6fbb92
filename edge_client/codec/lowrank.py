"""The low-rank part of an update: a few directions that hold most of a matrix's energy, as quantized factors.

What a client learns in one task is a sum of few gradients, each a product of what came in and what went wrong; most of
a weight matrix's change therefore lies in a handful of singular directions. Told as such, a direction of ``[m, n]``
costs ``m + n`` numbers, not ``m * n`` (Vogels et al. 2019, PowerSGD, arXiv 1905.13727; here without a shared basis).

A matrix ``M = U S V'`` is told as ``A = U S`` and ``B = V S``. An error of ``e`` in any one of their elements costs the
product ``A S^-1 B'`` about ``e^2``, just as in an element told by itself: reverse water-filling gives all of them the
same step. ``A`` is quantized first and ``B`` is then fitted to it, which mends most of what quantizing ``A`` broke.

The product is exact in float64, so that no order of summation, thread or processor changes a bit; ``FORMAT.md`` has its
arithmetic.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_client.codec.quantize import levels, reconstruct

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
_PRICE = 0.1
"""Energy, in squared steps, that a bit must bring: what a bit brings elsewhere."""
_TOLD = 0.1
"""Variance, in squared steps, from which elements are told."""
_OCTAVES = 20
_FLOOR = 0.33
"""In steps and roots of the longer side; of 156 factors of real updates the weakest direction had 0.22, 95 % 0.33."""
_MORE = 16
"""Directions that are looked for at once."""
_PIECE = 1 << 16
"""Elements of the product that are made at once: they stay in the cache."""
_C_BITS = 24


@dataclass(frozen=True)
class Factors:
    """``left`` ``[m, r]`` and ``right`` ``[n, r]``, int32 levels."""

    left: Levels
    right: Levels

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.left.shape[1])

    @property
    def exact(self) -> bool:
        """Whether all sums of the product stay below 2^53, and those of the squares of ``left`` too."""
        for side in (self.left, self.right):
            if side.max() > LEVEL_LIMIT or side.min() < -LEVEL_LIMIT:
                return False
        left = self.left.astype(np.float64)
        return bool((np.einsum("ji,ji->i", left, left) <= _ENERGY_LIMIT).all())

    def product(self, step: float, offsets: tuple[int, int, int]) -> Iterator[tuple[slice, Matrix]]:
        """The matrix ``[m, n]``, some rows at a time, the same bits on every platform.

        ``offsets`` are the centroids of the right factor's levels, as in `quantize.Quantized`.
        """
        left = self.left.astype(np.float64)
        norms = np.sqrt(np.einsum("ji,ji->i", left, left))
        right = reconstruct(self.right, offsets)
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
    """The leading directions of a matrix, strongest first: ``left = U S`` ``[m, k]``, ``right = V S`` ``[n, k]``.

    ``rows`` ``[m]`` and ``columns`` ``[n]`` are the matrix's energy in each; all of them float64.
    """

    left: Coefficients
    right: Coefficients
    rows: Coefficients
    columns: Coefficients


def suits(shape: tuple[int, int]) -> bool:
    """Whether a matrix may be told by factors."""
    return min(shape) >= _SIDE


def most(shape: tuple[int, int]) -> int:
    """The highest rank that a matrix may be told with."""
    return min(RANK_LIMIT, min(shape) // 2)


def floor(shape: tuple[int, ...], step: float) -> float:
    """The singular value below which a direction has hardly ever been worth its bits."""
    return _FLOOR * step * math.sqrt(max(shape))


def sketch(matrix: Matrix, least: float) -> Sketch:
    """Find the directions of ``matrix`` (``[m, n] float32``) whose singular values are above ``least``.

    Randomized range finder (Halko, Martinsson and Tropp 2011, arXiv 0909.4061) from a fixed seed, with more vectors
    until what it finds falls below ``least`` or the limit is reached.
    """
    m, n = matrix.shape
    limit = most((m, n))
    rng = np.random.default_rng(0)
    basis, right = np.empty((m, 0), np.float32), np.empty((n, 0), np.float32)
    while True:
        count = min(_MORE, limit - basis.shape[1])
        more = matrix @ rng.standard_normal((n, count), np.float32)
        # One power iteration: without it, updates of the tests' models cost 14 % more bytes; a second saves 1 %.
        more = matrix @ _orthonormal(matrix.T @ _orthonormal(_without(more, basis)))
        more = _orthonormal(_without(more, basis))
        basis, right = np.hstack([basis, more]), np.hstack([right, matrix.T @ more])
        wide = right.astype(np.float64)
        energies, turn = np.linalg.eigh(wide.T @ wide)
        if basis.shape[1] >= limit or more.shape[1] < count or energies[0] < least**2:
            break
    kept = np.flatnonzero(energies > least**2)[::-1]
    turn = turn[:, kept]
    sides = [np.einsum(axes, matrix, matrix).astype(np.float64) for axes in ("jk,jk->j", "jk,jk->k")]
    return Sketch((basis @ turn) * np.sqrt(energies[kept]), wide @ turn, *sides)


def _without(columns: Matrix, basis: Matrix) -> Matrix:
    """What of the columns an orthonormal basis does not span."""
    rest: Matrix = columns - basis @ (basis.T @ columns)
    return rest


def _orthonormal(columns: Matrix) -> Matrix:
    """An orthonormal basis of what the columns span, but for directions too weak for float32 to tell."""
    wide = columns.astype(np.float64)
    energies, turn = np.linalg.eigh(wide.T @ wide)
    kept = energies > 1e-10 * energies.max(initial=0)
    basis: Matrix = ((wide @ turn[:, kept]) / np.sqrt(energies[kept])).astype(np.float32)
    return basis


def factorize(matrix: Matrix, found: Sketch, step: float) -> tuple[Factors, Coefficients] | None:
    """Quantize those of a matrix's directions that are worth their bits; None where none is.

    With the factors, what the right one's levels stand for: ``[n, r]``, in steps.
    """
    energy = np.einsum("ji,ji->i", found.left, found.left) / step**2
    strong = int(np.count_nonzero(energy > floor(matrix.shape, 1.0) ** 2))
    if not strong or energy[0] > LEVEL_LIMIT**2:
        return None
    energy = energy[:strong]
    sides = [side[:, :strong] / step for side in (found.left, found.right)]
    left, right = (levels(side, _DEAD_ZONE) for side in sides)
    price = _PRICE * (_bits(left) + _bits(right))
    for side, level in zip(sides, (left, right), strict=True):
        side -= level
        price += np.einsum("ji,ji->i", side, side)
    rank = int(np.argmin(_rest(found, strong, step) + np.append(0, np.cumsum(price))))
    if not rank:
        return None
    left = left[:, :rank]
    # Alternating least squares; once more saves another percent.
    right = levels(_fit(matrix.T, left, step), _DEAD_ZONE)
    left = levels(_fit(matrix, right, step), _DEAD_ZONE)
    fitted = _fit(matrix.T, left, step)
    factors = Factors(left, levels(fitted, _DEAD_ZONE))
    return (factors, fitted) if factors.exact else None


def _rest(found: Sketch, count: int, step: float) -> Coefficients:
    """What elements cost, in distortion and bits, after none, the first, ... all ``count`` directions are taken out.

    Where elements of variance ``v``, in squared steps, are far below the step, all of it is lost; where they are told,
    each halving saves half a bit. ``v`` up to 0.1, and ``0.1 * (1 + ln(v / 0.1))`` above it, is near an
    entropy-coded scalar quantizer of a Gaussian. An element's variance is what is left of its row times what is left of
    its column; rows and columns count by octaves of it.
    """
    counts, means, rest = [], [], np.zeros(0)
    for side, sums in ((found.left, found.rows), (found.right, found.columns)):
        left = np.repeat(sums[None, :] / step**2, count + 1, axis=0)
        left[1:] -= np.cumsum((side[:, :count] / step).T ** 2, axis=0)
        np.maximum(left, 0, out=left)
        rest = left.sum(axis=1)
        highest = np.maximum(left.max(axis=1, keepdims=True), 1e-300)
        octave = np.minimum(-np.log2(np.maximum(left / highest, 1e-300)), _OCTAVES - 1)
        at = (octave.astype(np.int64) + np.arange(count + 1)[:, None] * _OCTAVES).ravel()
        number = np.bincount(at, minlength=(count + 1) * _OCTAVES).reshape(count + 1, _OCTAVES)
        counts.append(number)
        means.append(np.bincount(at, left.ravel(), number.size).reshape(number.shape) / np.maximum(number, 1))
    variance = means[0][:, :, None] * means[1][:, None, :] / np.maximum(rest, 1e-300)[:, None, None]
    over = np.maximum(variance / _TOLD, 1.0)
    cost = np.minimum(variance, _TOLD) + _TOLD * np.log(over)
    total: Coefficients = np.einsum(
        "kr,kc,krc->k", counts[0].astype(np.float64), counts[1].astype(np.float64), cost, optimize=True
    )
    return total


def _fit(matrix: Matrix, given: Levels, step: float) -> Coefficients:
    """The other factor of ``matrix`` ``[n, m]`` in steps, ``[n, r]``, for the levels ``[m, r]`` of one."""
    wide = given.astype(np.float64)
    gram = wide.T @ wide
    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0
    gram /= norms * norms[:, None]
    # The ridge bounds the fit of directions that quantization made equal.
    gram[np.diag_indices_from(gram)] += 1e-6
    inverse = np.linalg.inv(gram) / norms[:, None] * (np.floor(norms) / (norms * step))
    fitted: Coefficients = (matrix @ given.astype(np.float32)) @ inverse
    np.clip(fitted, -LEVEL_LIMIT, LEVEL_LIMIT, out=fitted)
    return fitted


def _bits(coefficients: Levels) -> Coefficients:
    """About what each column costs: magnitudes that are geometric about a mean of row times column, and signs."""
    magnitude = np.abs(coefficients).astype(np.float32)
    columns, rows = magnitude.sum(axis=0), magnitude.sum(axis=1, keepdims=True)
    mean = np.maximum(rows * (columns / max(columns.sum(), 1.0)), np.float32(1e-9))
    bits = np.log2(1 + mean)
    bits += magnitude * np.log2(1 + 1 / mean)
    total: Coefficients = bits.sum(axis=0, dtype=np.float64) + np.count_nonzero(coefficients, axis=0)
    return total
