"""Linear maps along the axes of a grid: resizing, padding by reflection, average pooling and all their gradients.

Each of these is one sparse matrix along each spatial axis, and its gradient is the transposed matrices. ONNX Runtime
multiplies by such a matrix faster than it runs its own kernels: [32, 64, 14, 14] to twice the size takes 0.9 ms, a
linear `Resize` 2.7 ms; for the gradient there is no kernel at all. Along an axis too long for that, or where it only
copies rows, the entries of the matrix that are not zero are gathered instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export.graph import Array
from export.lower import Lowering, Value

MOST_ENTRIES = 2**18
"""Larger matrices are not written out: they are in the bundle."""

# Nanoseconds for each number of the result, fitted to sizes of 14 to 448 on one core.
PRODUCT_COST, ENTRY_COST = 0.5, 0.011
GATHER_COST, SCATTERED_GATHER_COST = 0.25, 3.2  # whole rows; single numbers, along the last axis
WEIGHT_COST, SUM_COST = 0.4, 0.3


@dataclass(frozen=True)
class AxisMap:
    """A sparse matrix ``[outputs, inputs]``: ``y[i]`` is the sum over ``k`` of ``weights[i, k] x[columns[i, k]]``."""

    inputs: int
    columns: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    @property
    def outputs(self) -> int:
        """Size of the result."""
        return len(self.columns)

    @classmethod
    def of_entries(cls, outputs: int, inputs: int, rows: Array, columns: Array, weights: Array) -> "AxisMap":
        """From the entries that are not zero, in any order."""
        order = np.argsort(rows, kind="stable")
        rows, columns, weights = rows[order], columns[order], weights[order]
        counts = np.bincount(rows, minlength=outputs)
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        width = max(int(counts.max(initial=0)), 1)
        found = cls(inputs, np.zeros((outputs, width), np.int64), np.zeros((outputs, width)))
        found.columns[rows, place] = columns
        found.weights[rows, place] = weights
        return found

    @classmethod
    def of_dense(cls, matrix: Array) -> "AxisMap":
        """From a matrix ``[outputs, inputs]``."""
        rows, columns = np.nonzero(matrix)
        return cls.of_entries(len(matrix), matrix.shape[1], rows, columns, matrix[rows, columns])

    @classmethod
    def of_places(cls, inputs: int, places: Array) -> "AxisMap":
        """One that copies: output ``i`` is input ``places[i]``."""
        return cls(inputs, places.astype(np.int64)[:, None], np.ones((len(places), 1)))

    @classmethod
    def of_windows(cls, inputs: int, starts: Array, ends: Array, divisors: Array) -> "AxisMap":
        """One that sums inputs from ``starts[i]`` up to, without, ``ends[i]`` and divides by ``divisors[i]``."""
        lengths = ends - starts
        rows = np.repeat(np.arange(len(starts)), lengths)
        columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + starts[rows]
        return cls.of_entries(len(starts), inputs, rows, columns, 1 / divisors[rows])

    def transposed(self) -> "AxisMap":
        """The map that gradients take."""
        rows, taps = np.nonzero(self.weights)
        return AxisMap.of_entries(self.inputs, self.outputs, self.columns[rows, taps], rows, self.weights[rows, taps])

    def dense(self, dtype: str) -> Array:
        """The matrix ``[outputs, inputs]``."""
        matrix = np.zeros((self.outputs, self.inputs))
        np.add.at(matrix, (np.arange(self.outputs)[:, None], self.columns), self.weights)
        return matrix.astype(dtype)

    @property
    def weighted(self) -> bool:
        """Whether it does more than copy and add."""
        return bool((self.weights != 1).any())

    def favours_product(self, last: bool) -> bool:
        """Whether a product with the written-out matrix is the fastest, along the last axis or another."""
        taps = self.columns.shape[1]
        gathers = taps * ((SCATTERED_GATHER_COST if last else GATHER_COST) + WEIGHT_COST * self.weighted)
        fast = PRODUCT_COST + ENTRY_COST * self.inputs <= gathers + SUM_COST * (taps - 1)
        return fast and self.outputs * self.inputs <= MOST_ENTRIES

    @property
    def changes_nothing(self) -> bool:
        """Whether this is the identity."""
        same = self.outputs == self.inputs and self.columns.shape[1] == 1 and not self.weighted
        return same and bool((self.columns[:, 0] == np.arange(self.inputs)).all())


def along_axes(b: Lowering, x: Value, maps: Sequence[AxisMap]) -> str:
    """``x [N, ..., *spatial]`` with a map along each of its last axes, as many as there are maps."""
    name, shape = x.name, list(x.shape)
    first = x.rank - len(maps)
    # What shrinks most goes first, for the least arithmetic; the last axis before others, as one matrix product.
    order = sorted(range(len(maps)), key=lambda i: (maps[i].outputs / maps[i].inputs, -i))
    for i in order:
        if not maps[i].changes_nothing:
            name = _along(b, Value(name, tuple(shape), x.dtype), first + i, maps[i])
            shape[first + i] = maps[i].outputs
    return name


def _along(b: Lowering, x: Value, axis: int, linear: AxisMap) -> str:
    if not linear.favours_product(last=axis == x.rank - 1):
        return _by_taps(b, x, axis, linear)
    matrix = linear.dense(x.dtype)
    if axis == x.rank - 1:
        return b.op("MatMul", x.name, b.constant(matrix.T))
    inner = x.static(*range(axis + 1, x.rank))
    flat = b.reshape(x.name, [*x.shape[: axis + 1], math.prod(inner)])
    return b.reshape(b.op("MatMul", b.constant(matrix), flat), [*x.shape[:axis], linear.outputs, *inner])


def _by_taps(b: Lowering, x: Value, axis: int, linear: AxisMap) -> str:
    terms = []
    for columns, weights in zip(linear.columns.T, linear.weights.T, strict=True):
        term = b.op("Gather", x.name, b.constant(columns), axis=axis)
        if (weights != 1).any():
            scale = weights.astype(x.dtype).reshape([-1] + [1] * (x.rank - 1 - axis))
            term = b.op("Mul", term, b.constant(scale))
        terms.append(term)
    return b.op("Sum", *terms) if len(terms) > 1 else terms[0]
