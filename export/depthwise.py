"""Convolution of each channel with a kernel of its own, as batched matrix products over blocks of rows.

What a block of output rows sees of the input is one block of rows; between the two a channel's kernel is a small
matrix with its taps along the diagonals. That is many times the arithmetic of the convolution, at a hundred times the
speed: ONNX Runtime's own depthwise convolution wants constant weights and takes four times longer without.
With [32, 64, 25, 5], 3x3, one thread, forward and both gradients: 1.0 ms; by Conv, ConvTranspose and slices 12 ms.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from export import formulation as f
from export.lower import Lowering

LEAST_OUTPUTS = 20
"""Output pixels of a block, about: fewer make products too small, more make matrices with too many zeros."""

LARGEST_WIDTH = 64
"""Widest row that is one side of the matrix."""


@dataclass(frozen=True)
class _Map:
    """Blocks of ``rows`` rows out, each from ``window`` rows in, which begin at ``step * block + offset``.

    ``taps[t]`` is the 0/1 matrix ``[rows * width out, window * width in]`` of where tap ``t`` of the kernel stands.
    """

    rows: int
    window: int
    step: int
    offset: int
    taps: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Depthwise:
    """Along the first spatial axis by blocks, along the second (of size 1 where there is none) whole."""

    layer: f.Layer
    name = "depthwise"

    @staticmethod
    def suits(layer: f.Layer) -> bool:
        """Whether it can compute the layer."""
        return layer.depthwise and len(layer.sizes) <= 2 and (len(layer.sizes) == 1 or layer.sizes[1] <= LARGEST_WIDTH)

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`."""
        return self._apply(b, x, weight, self._forward, self._high[0], self._wide[0], self._high[1], self.layer.results)

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """See `Formulation`."""
        high, wide = self._high, self._wide
        return self._apply(b, grad, weight, self._backward, high[1], wide[1], high[0], self.layer.sizes)

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        found, blocks = self._forward, self._blocks(self._forward, self._high[1])
        wide = self._wide[1]
        rows = self._channel_major(b, grad)
        extra = blocks * found.rows - self._high[1]
        if extra:
            shaped = b.op("Reshape", rows, b.ints([self.layer.inputs, self._high[1], -1]))
            rows = b.op("Pad", shaped, b.ints([0, 0, 0, 0, extra, 0]), b.scalar(0, "float32"))
        left = b.op("Reshape", rows, b.ints([self.layer.inputs, blocks, found.rows * wide, -1]))
        right = self._windows(b, x, found, self._high[0], self._wide[0], blocks)
        product = b.op("MatMul", left, b.transpose(right, [0, 1, 3, 2]))
        summed = b.reduce("ReduceSum", product, [1])
        flat = b.op("Reshape", summed, b.ints([self.layer.inputs, -1]))
        taps = b.constant(found.taps.reshape(self.layer.taps, -1))
        return b.op("Reshape", b.op("Gemm", flat, taps, transB=1), b.ints(self.layer.weight_shape))

    @property
    def _high(self) -> tuple[int, int]:
        return self.layer.sizes[0], self.layer.results[0]

    @property
    def _wide(self) -> tuple[int, int]:
        return (self.layer.sizes[1], self.layer.results[1]) if len(self.layer.sizes) == 2 else (1, 1)

    @property
    def _axes(self) -> list[tuple[int, int, int, int]]:
        """Kernel, stride, padding and dilation of both axes."""
        layer = self.layer
        given = list(zip(layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True))
        return given if len(given) == 2 else [*given, (1, 1, 0, 1)]

    @property
    def _forward(self) -> _Map:
        k, stride, padding, dilation = self._axes[0]
        rows = min(-(-LEAST_OUTPUTS // self._wide[1]), self._high[1])
        window = (rows - 1) * stride + (k - 1) * dilation + 1
        places = [(out, t, out * stride + t * dilation) for out in range(rows) for t in range(k)]
        columns = [(o, t, i) for o, t, i in self._columns()]
        return _Map(rows, window, rows * stride, -padding, self._taps(rows, window, places, columns, self._wide))

    @property
    def _backward(self) -> _Map:
        k, stride, padding, dilation = self._axes[0]
        blocks = -(-min(-(-LEAST_OUTPUTS // self._wide[0]), self._high[0]) // stride)
        rows = blocks * stride
        first = -((-padding + (k - 1) * dilation) // stride)  # the ceiling of (padding - reach) / stride
        window = (rows - 1 + padding) // stride - first + 1
        places = []
        for row in range(rows):
            for t in range(k):
                place, rest = divmod(row + padding - t * dilation, stride)
                if not rest:
                    places.append((row, t, place - first))
        columns = [(i, t, o) for o, t, i in self._columns()]
        taps = self._taps(rows, window, places, columns, self._wide[::-1])
        return _Map(rows, window, blocks, first, taps)

    def _columns(self) -> list[tuple[int, int, int]]:
        """Output column, tap, input column, for every column that is there."""
        k, stride, padding, dilation = self._axes[1]
        sizes, results = self._wide
        found = [(o, t, o * stride + t * dilation - padding) for o in range(results) for t in range(k)]
        return [(o, t, i) for o, t, i in found if 0 <= i < sizes]

    def _taps(
        self,
        rows: int,
        window: int,
        places: list[tuple[int, int, int]],
        columns: list[tuple[int, int, int]],
        widths: tuple[int, int],
    ) -> npt.NDArray[np.float32]:
        high, wide = self._axes[0][0], self._axes[1][0]
        before, after = widths
        taps = np.zeros((high, wide, rows, after, window, before), np.float32)
        for row, t, place in places:
            for column, u, source in columns:
                taps[t, u, row, column, place, source] = 1
        return taps.reshape(high * wide, rows * after, window * before)

    @staticmethod
    def _blocks(found: _Map, height: int) -> int:
        return -(-height // found.rows)

    def _channel_major(self, b: Lowering, name: str) -> str:
        return f.to_channel_major(b, name, len(self.layer.sizes) + 2)

    def _windows(self, b: Lowering, name: str, found: _Map, height: int, width: int, blocks: int) -> str:
        """``[C, blocks, window * width, N]``: the rows that each block sees, zeros beyond the edges."""
        last = (blocks - 1) * found.step + found.offset + found.window
        before, after = max(0, -found.offset), max(0, last - height)
        rows = b.op("Reshape", self._channel_major(b, name), b.ints([self.layer.inputs, height, -1]))
        if before or after:
            rows = b.op("Pad", rows, b.ints([0, before, 0, 0, after, 0]), b.scalar(0, "float32"))
        starts = np.arange(blocks)[:, None] * found.step + found.offset + before
        table = (starts + np.arange(found.window)).ravel()
        if not np.array_equal(table, np.arange(before + height + after)):
            rows = b.op("Gather", rows, b.constant(table.astype(np.int32)), axis=1)
        return b.op("Reshape", rows, b.ints([self.layer.inputs, blocks, found.window * width, -1]))

    def _apply(
        self,
        b: Lowering,
        name: str,
        weight: str,
        found: _Map,
        height: int,
        width: int,
        wanted: int,
        shape: tuple[int, ...],
    ) -> str:
        channels, blocks = self.layer.inputs, self._blocks(found, wanted)
        flat = b.op("Reshape", weight, b.ints([channels, self.layer.taps]))
        matrices = b.op("Gemm", flat, b.constant(found.taps.reshape(self.layer.taps, -1)))
        matrices = b.op("Reshape", matrices, b.ints([channels, 1, *found.taps.shape[1:]]))
        product = b.op("MatMul", matrices, self._windows(b, name, found, height, width, blocks))
        if blocks * found.rows > wanted:
            product = b.op("Reshape", product, b.ints([channels, blocks * found.rows, -1]))
            product = b.slice(product, [1], [0], [wanted])
        return f.from_channel_major(b, b.op("Reshape", product, b.ints([channels, *shape, -1])), len(shape) + 2)
