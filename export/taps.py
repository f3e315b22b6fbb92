"""Convolution of few channels: one row for each tap of the kernel and channel, one column for each output pixel.

A row is gathered in runs of the batch, ``[C * taps, results * N]``, and serves the product and the weights' gradient.
With [32, 1, 49, 10] to 64 channels, 10x4, stride 2, one thread: 0.5 ms forward and gradient; PyTorch takes 3.8.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export import formulation as f
from export.lower import Lowering

MOST_CHANNELS = 4
MOST_ROWS = 64
"""Taps times channels, unless there are few channels: with more, rows are much larger than what they are made of."""


@dataclass(frozen=True)
class Taps:
    """The product of the weights with the rows."""

    layer: f.Layer
    channel_major: bool
    name = "taps"

    @staticmethod
    def suits(layer: f.Layer) -> bool:
        """Whether it can compute the layer well."""
        few = layer.inputs <= MOST_CHANNELS or layer.inputs * layer.taps <= MOST_ROWS
        return layer.groups == 1 and layer.taps > 1 and few

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`."""
        layer, rank = self.layer, len(self.layer.sizes) + 2
        rows, matrix = self._rows(b, x), self._matrix(b, weight)
        if self.channel_major:
            product = b.op("Gemm", matrix, rows)
            return f.from_channel_major(b, b.op("Reshape", product, b.ints([layer.outputs, *layer.results, -1])), rank)
        product = b.op("Gemm", rows, matrix, transA=1, transB=1)
        return f.from_spatial_major(b, b.op("Reshape", product, b.ints([*layer.results, -1, layer.outputs])), rank)

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """See `Formulation`: each tap's row goes back to where it was gathered, and is added up there."""
        layer = self.layer
        matrix = self._matrix(b, weight)
        if self.channel_major:
            rows = b.op("Gemm", matrix, self._flat(b, grad), transA=1)
        else:
            rows = b.op("Gemm", matrix, self._flat(b, grad), transA=1, transB=1)
        places = b.op("Reshape", rows, b.ints([layer.inputs, layer.taps, *layer.results, -1]))
        parts = b.ops("Split", layer.taps, places, b.ints([1] * layer.taps), axis=1) if layer.taps > 1 else [places]
        padded = [size + 2 * p for size, p in zip(layer.sizes, layer.padding, strict=True)]
        shape = b.ints([layer.inputs, *layer.results, -1])
        spread = [
            self._placed(b, b.op("Reshape", part, shape), tap, padded)
            for part, tap in zip(parts, itertools.product(*map(range, layer.kernel)), strict=True)
        ]
        total = b.op("Sum", *spread)
        axes = range(1, len(padded) + 1)
        ends = [p + size for p, size in zip(layer.padding, layer.sizes, strict=True)]
        return f.from_channel_major(b, b.slice(total, axes, layer.padding, ends), len(padded) + 2)

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        rows = self._rows(b, x)
        if self.channel_major:
            product = b.op("Gemm", self._flat(b, grad), rows, transB=1)
        else:
            product = b.op("Gemm", self._flat(b, grad), rows, transA=1, transB=1)
        return b.op("Reshape", product, b.ints(self.layer.weight_shape))

    def _matrix(self, b: Lowering, weight: str) -> str:
        return b.op("Reshape", weight, b.ints([self.layer.outputs, -1]))

    def _flat(self, b: Lowering, grad: str) -> str:
        rank, channels = len(self.layer.sizes) + 2, self.layer.outputs
        if self.channel_major:
            return b.op("Reshape", f.to_channel_major(b, grad, rank), b.ints([channels, -1]))
        return b.op("Reshape", f.to_spatial_major(b, grad, rank), b.ints([-1, channels]))

    def _rows(self, b: Lowering, x: str) -> str:
        """``[C * taps, results * N]``; equal calls become one node."""
        layer, n = self.layer, len(self.layer.sizes)
        last = f.to_channel_major(b, x, n + 2)
        if any(layer.padding):
            last = b.op("Pad", last, b.ints([0, *layer.padding, 0] * 2), b.scalar(0, "float32"))
        padded = [size + 2 * p for size, p in zip(layer.sizes, layer.padding, strict=True)]
        # Where output o and tap t look along each axis; the table adds up the axes of the padded input.
        table = np.arange(layer.inputs)
        for i, (k, count) in enumerate(zip(layer.kernel, layer.results, strict=True)):
            places = np.arange(k)[:, None] * layer.dilation[i] + np.arange(count)[None] * layer.stride[i]
            table = table[..., None, None] * padded[i] + places
        table = table.transpose([0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2)]).ravel()
        flat = b.op("Reshape", last, b.ints([layer.inputs * math.prod(padded), -1]))
        gathered = b.op("Gather", flat, b.constant(table.astype(np.int32)), axis=0)
        return b.op("Reshape", gathered, b.ints([layer.inputs * layer.taps, -1]))

    def _placed(self, b: Lowering, part: str, tap: Sequence[int], padded: Sequence[int]) -> str:
        """``[C, *results, N]`` spread by the stride and shifted to where the tap looks, in ``[C, *padded, N]``."""
        layer, shape = self.layer, list(self.layer.results)
        for i, stride in enumerate(layer.stride):
            if stride > 1:
                # Zeros between the pixels: a new axis of the stride's length, of which the first place is taken.
                part = b.op("Reshape", part, b.ints([layer.inputs, *shape[: i + 1], 1, *shape[i + 1 :], -1]))
                pads = [0] * (len(shape) + 3) * 2
                pads[len(shape) + 3 + i + 2] = stride - 1
                part = b.op("Pad", part, b.ints(pads), b.scalar(0, "float32"))
                shape[i] *= stride
                part = b.op("Reshape", part, b.ints([layer.inputs, *shape, -1]))
        before = [t * d for t, d in zip(tap, layer.dilation, strict=True)]
        after = [size - first - n for size, first, n in zip(padded, before, shape, strict=True)]
        return b.op("Pad", part, b.ints([0, *before, 0, 0, *after, 0]), b.scalar(0, "float32"))
