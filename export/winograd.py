"""Convolution with fewer multiplications, as matrix products: Winograd's algorithms and their adjoints.

Along one axis, ``m`` outputs of a kernel of ``k`` taps are ``A ((G g) * (B d))`` with constant matrices: ``m + k - 1``
multiplications instead of ``m k`` (Winograd 1980; Lavin and Gray 2015, arXiv 1509.09308; the matrices are Toom-Cook's,
transposed). A strided convolution is the sum of one such algorithm for each phase of the input. The step is linear in
``d`` and in ``g``, so both gradients are the same products with the matrices transposed.

Space comes first and channels last, ``[*spatial, N, C]``: then transforming an axis is a product with a small constant
matrix on the left, padding and cropping are part of that matrix, and what is multiplied in between is one matrix
product ``[tiles * N, C] [C, O]`` for each of the algorithm's points. Nothing is gathered or copied.

With [32, 32, 14, 14] to 64 channels, 5x5, one thread, forward and both gradients: 8.2 ms, 3e-6 to 7e-6 off; by columns
and ConvTranspose 25 ms; oneDNN 10.5 ms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from export import formulation as f
from export.lower import Lowering

MOST_POINTS = 8
"""Points of one algorithm. Rounding grows with their number: with 8, results are off by some 1e-5."""

LARGEST_SIDE = 64
"""Longest axis that is transformed by a dense matrix; its cost grows with the side."""

_POINTS = tuple(Fraction(*p) for p in ((0, 1), (1, 1), (-1, 1), (2, 1), (-2, 1), (1, 2), (-1, 2)))

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Axis:
    """The algorithm along one axis: ``points * tiles`` products give all outputs.

    ``into``: ``[points * tiles, input size]``; ``back``: ``[output size, points * tiles]``; ``taps``: ``[points, k]``.
    """

    points: int
    tiles: int
    into: Matrix
    back: Matrix
    taps: Matrix

    @property
    def plain(self) -> bool:
        """Whether the axis stays as it is."""
        return self.points == 1 and np.array_equal(self.into, np.eye(len(self.into)))


def correlation(outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """Toom-Cook's ``A [m, p], G [p, k], B [p, p]`` with ``p = m + k - 1``, exact until they are rounded to floats."""
    points = outputs + taps - 1

    def powers(width: int) -> list[list[Fraction]]:
        rows = [[point**j for j in range(width)] for point in _POINTS[: points - 1]]
        return [*rows, [Fraction(0)] * (width - 1) + [Fraction(1)]]

    inverse = _inverse(powers(points))
    into = np.array([[float(inverse[j][i]) for j in range(points)] for i in range(points)])
    kernel = np.array([[float(v) for v in row] for row in powers(taps)])
    back = np.array([[float(v) for v in row] for row in powers(outputs)]).T
    # A power of two moves between the two sides of each product, so that neither is much larger than the other.
    scale = np.exp2(np.round(np.log2(np.abs(into).sum(1) / np.abs(kernel).sum(1)) / 2))
    return back, kernel * scale[:, None], into / scale[:, None]


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    size = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [v / rows[column][column] for v in rows[column]]
        for i in range(size):
            factor = rows[i][column]
            if i != column and factor:
                rows[i] = [v - factor * w for v, w in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]


@cache
def axis(size: int, outputs: int, taps: int, stride: int, padding: int) -> Axis | None:
    """The cheapest algorithm along one axis, or None where none has few enough points."""
    if taps == stride == 1 and not padding:
        identity = np.eye(size)
        return Axis(1, size, identity, identity, np.ones((1, 1)))
    # Each phase of the input has its own taps and its own algorithm.
    phases = [len(range(q, taps, stride)) for q in range(min(stride, taps))]
    best: tuple[int, int] | None = None
    for m in range(1, MOST_POINTS + 1):
        if max(phases) + m - 1 <= MOST_POINTS:
            points = sum(k + m - 1 for k in phases)
            best = min(filter(None, (best, (points * -(-outputs // m), m))))
    if best is None:
        return None
    m = best[1]
    algorithms = [correlation(m, k) for k in phases]
    points, tiles = sum(len(b) for _, _, b in algorithms), -(-outputs // m)
    into, back = np.zeros((points, tiles, size)), np.zeros((outputs, points, tiles))
    kernel = np.zeros((points, taps))
    first = 0
    for phase, (a, g, b) in enumerate(algorithms):
        chosen = slice(first, first + len(b))
        first += len(b)
        kernel[chosen, phase::stride] = g
        for tile in range(tiles):
            for j in range(len(b)):
                place = (tile * m + j) * stride + phase - padding
                if 0 <= place < size:
                    into[chosen, tile, place] = b[:, j]
            for i in range(min(m, outputs - tile * m)):
                back[tile * m + i, chosen, tile] = a[i]
    return Axis(points, tiles, into.reshape(-1, size), back.reshape(outputs, -1), kernel)


@dataclass(frozen=True)
class Winograd:
    """Any dense convolution of small sides and kernels, strided ones too."""

    layer: f.Layer
    name = "winograd"

    @staticmethod
    def suits(layer: f.Layer) -> bool:
        """Whether it can compute the layer well."""
        if layer.groups > 1 or set(layer.dilation) != {1} or max(*layer.sizes, *layer.results) > LARGEST_SIDE:
            return False
        return all(found is not None for found in _axes(layer))

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`."""
        product = b.op("MatMul", self._values(b, x), _flipped(b, self._points(b, weight), len(self._axes)))
        return self._outward(b, product, [a.back for a in self._axes], self.layer.outputs)

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """See `Formulation`."""
        product = b.op("MatMul", self._differences(b, grad), self._points(b, weight))
        return self._outward(b, product, [a.into.T for a in self._axes], self.layer.inputs)

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        flipped = _flipped(b, self._differences(b, grad), len(self._axes))
        product = b.op("MatMul", flipped, self._values(b, x))
        # The last axis's tiles are rows of the product; the others' are summed here.
        tiled = [2 * i + 1 for i, a in enumerate(self._axes[:-1]) if a.tiles > 1]
        if tiled:
            product = b.reduce("ReduceSum", product, tiled, keep=True)
        flat = b.op("Reshape", product, b.ints([self._count, self.layer.outputs * self.layer.inputs]))
        return b.op("Reshape", b.op("Gemm", flat, self._taps(b), transA=1), b.ints(self.layer.weight_shape))

    @property
    def _axes(self) -> tuple[Axis, ...]:
        return tuple(a for a in _axes(self.layer) if a is not None)

    @property
    def _count(self) -> int:
        return math.prod(a.points for a in self._axes)

    def _taps(self, b: Lowering) -> str:
        """``[points, taps]`` of all axes together."""
        matrix: Matrix = np.ones((1, 1))
        for a in self._axes:
            matrix = np.kron(matrix, a.taps).astype(np.float64)
        return b.constant(matrix.astype(np.float32))

    def _points(self, b: Lowering, weight: str) -> str:
        """The weights at the points: ``[p1, 1, p2, ..., O, C]``."""
        flat = b.op("Reshape", weight, b.ints([self.layer.outputs * self.layer.inputs, -1]))
        found = b.op("Gemm", self._taps(b), flat, transB=1)
        shape = [n for a in self._axes for n in (a.points, 1)][:-1]
        return b.op("Reshape", found, b.ints([*shape, self.layer.outputs, self.layer.inputs]))

    def _values(self, b: Lowering, x: str) -> str:
        """The input at the points: ``[p1, t1, p2, ..., t * N, C]``."""
        return self._inward(b, x, [a.into for a in self._axes], self.layer.inputs)

    def _differences(self, b: Lowering, grad: str) -> str:
        """The output's gradient at the points."""
        return self._inward(b, grad, [a.back.T for a in self._axes], self.layer.outputs)

    def _inward(self, b: Lowering, x: str, matrices: Sequence[Matrix], channels: int) -> str:
        rows = f.to_spatial_major(b, x, len(matrices) + 2)
        transformed = self._transform(b, rows, matrices, order=range(len(matrices))[::-1])
        shape = [n for a in self._axes for n in (a.points, a.tiles)][:-1]
        return b.op("Reshape", transformed, b.ints([*shape, -1, channels]))

    def _outward(self, b: Lowering, product: str, matrices: Sequence[Matrix], channels: int) -> str:
        transformed = self._transform(b, product, matrices, order=range(len(matrices)))
        shaped = b.op("Reshape", transformed, b.ints([*(len(m) for m in matrices), -1, channels]))
        return f.from_spatial_major(b, shaped, len(matrices) + 2)

    def _transform(self, b: Lowering, x: str, matrices: Sequence[Matrix], order: Sequence[int]) -> str:
        # Largest last on the way in and first on the way out: what is written in between is small.
        sizes = [m.shape[1] for m in matrices]
        for i in order:
            if not self._axes[i].plain:
                before = math.prod(sizes[:i])
                matrix = b.constant(matrices[i].astype(np.float32))
                if before == 1:
                    x = b.op("Gemm", matrix, b.op("Reshape", x, b.ints([sizes[i], -1])))
                else:
                    x = b.op("MatMul", matrix, b.op("Reshape", x, b.ints([before, sizes[i], -1])))
            sizes[i] = len(matrices[i])
        return x


def _axes(layer: f.Layer) -> tuple[Axis | None, ...]:
    given = zip(layer.sizes, layer.results, layer.kernel, layer.stride, layer.padding, strict=True)
    return tuple(axis(*one) for one in given)


def _flipped(b: Lowering, name: str, axes: int) -> str:
    """The last two of ``2 * axes + 1`` axes exchanged; ONNX Runtime makes it a flag of the product that reads it."""
    rank = 2 * axes + 1
    return b.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])
