"""Convolution as matrix products over columns: rows are output pixels, columns are what the kernel sees there.

Times are for [32, 32, 14, 14] to 64 channels, 5x5, one thread:

- Columns are a `Gather` of runs of channels with a constant table of pixels, at the speed of a copy: 3.0 ms for
  20 MB. A `Slice` for each tap and a `Concat` took 10 ms.
- The product of columns and weights takes 5.3 to 5.8 ms and leaves channels last, as pooling and the gradients want
  them; `Conv`, whose own product is tall and thin, takes 7.7 ms.
- The weights' gradient takes 6.9 ms from the columns that are there already, 12 ms from slices. So they are kept
  (20 MB until the backward pass reads them) rather than gathered twice.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt

from export.direct import Direct
from export.formulation import Layer
from export.lower import Lowering

LEAST_RUN = 16
"""Fewer channels make runs of less than a cache line, which `Gather` copies at a fraction of the memory's speed."""

GROUP_WIDTH = 320
"""Columns of one product. The weights' gradient reads columns transposed: 800 wide, the transposed panel falls out of
the cache. Forward and gradient together take 15.1 ms in one group of 800, 14.7 in two, 12.7 in three, 13.6 in five."""


class Columns(Direct):
    """The product over columns, and the weights' gradient from them; the input's gradient is a `ConvTranspose`."""

    name = "columns"

    @staticmethod
    def suits(layer: Layer) -> bool:
        """Whether it can compute the layer well: one group, and channels enough for long runs."""
        return layer.groups == 1 and layer.inputs >= LEAST_RUN

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`: products over groups of columns, each added to the one before."""
        outputs, inputs, taps = self.layer.outputs, self.layer.inputs, self.layer.taps
        rows = b.transpose(b.op("Reshape", weight, b.ints([outputs, inputs * taps])), [1, 0])
        # Rows by tap, then channel. By Gather: ONNX Runtime joins two Transposes to one, which is ten times slower.
        order = np.arange(inputs * taps).reshape(inputs, taps).T
        parts = [rows]
        if taps > 1:
            groups = [taken for taken, _ in self._groups()]
            parts = [b.op("Gather", rows, _places(b, order[taken]), axis=0) for taken in groups]
        total: list[str] = []
        for column, part in zip(self._gathered(b, x), parts, strict=True):
            total = [b.op("Gemm", column, part, *total)]
        shaped = b.op("Reshape", total[0], b.ints([-1, *self.layer.results, outputs]))
        rank = len(self.layer.results) + 2
        return b.transpose(shaped, [0, rank - 1, *range(1, rank - 1)])

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        outputs, inputs, taps = self.layer.outputs, self.layer.inputs, self.layer.taps
        right = b.op("Reshape", self._channels_last(b, grad), b.ints([-1, outputs]))
        products = [b.op("Gemm", column, right, transA=1) for column in self._gathered(b, x)]
        rows = b.op("Concat", *products, axis=0) if len(products) > 1 else products[0]
        if taps > 1:
            rows = b.op("Gather", rows, _places(b, np.arange(taps * inputs).reshape(taps, inputs).T), axis=0)
        return b.op("Reshape", b.transpose(rows, [1, 0]), b.ints(self.layer.weight_shape))

    def _channels_last(self, b: Lowering, name: str) -> str:
        return b.transpose(name, [0, *self._spatial, 1])

    def _gathered(self, b: Lowering, x: str) -> list[str]:
        """The columns in groups of taps: ``[N * pixels, taps * C]`` each; equal calls become one node."""
        layer = self.layer
        last = self._channels_last(b, x)
        padded = [size + 2 * p for size, p in zip(layer.sizes, layer.padding, strict=True)]
        if any(layer.padding):
            last = b.op("Pad", last, b.ints([0, *layer.padding, 0] * 2), b.scalar(0, "float32"))
        if layer.taps == 1 and set(layer.stride) == {1}:
            return [b.op("Reshape", last, b.ints([-1, layer.inputs]))]
        flat = b.op("Reshape", last, b.ints([0, -1, layer.inputs]))
        # Where along each axis output o and tap t look; the table adds up the axes of the padded input.
        table: npt.NDArray[np.int64] = np.zeros((), np.int64)
        for i, (k, n) in enumerate(zip(layer.kernel, layer.results, strict=True)):
            places = np.arange(n)[:, None] * layer.stride[i] + np.arange(k)[None] * layer.dilation[i]
            table = table[..., None, None] * padded[i] + places
        n = len(layer.kernel)
        table = table.transpose([*range(0, 2 * n, 2), *range(1, 2 * n, 2)]).reshape(math.prod(layer.results), -1)
        return [
            b.op("Reshape", b.op("Gather", flat, _places(b, table[:, taps]), axis=1), b.ints([-1, width]))
            for taps, width in self._groups()
        ]

    def _groups(self) -> list[tuple[slice, int]]:
        """Even groups of taps, with their widths in columns."""
        taps, channels = self.layer.taps, self.layer.inputs
        count = -(-taps * channels // max(GROUP_WIDTH, channels))
        bounds = [round(i * taps / count) for i in range(count + 1)]
        return [(slice(i, j), (j - i) * channels) for i, j in itertools.pairwise(bounds)]


def _places(b: Lowering, table: npt.NDArray[np.int64]) -> str:
    return b.constant(table.ravel().astype(np.int32))
