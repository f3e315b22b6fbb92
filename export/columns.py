"""Convolution as matrix products over columns: rows are output pixels, columns are what the kernel sees there.

Times are for [32, 32, 14, 14] to 64 channels, 5x5, one thread:

- Columns are a `Gather` of runs of channels with a constant table of pixels, at the speed of a copy: 3.0 ms for
  20 MB. A `Slice` for each tap and a `Concat` took 10 ms.
- The product of columns and weights takes 5.3 to 5.8 ms and leaves channels last, as pooling and the gradients want
  them; `Conv`, whose own product is tall and thin, takes 7.7 ms.
- The weight's gradient takes 6.9 ms from the columns that are there already, 12 ms from slices. So they are kept
  (20 MB until the backward pass reads them) rather than gathered twice.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.lower import Lowering, Value

LEAST_RUN = 16
"""Fewer channels make runs of less than a cache line, which `Gather` copies at a fraction of the memory's speed."""

GROUP_WIDTH = 320
"""Columns of one product. The weight's gradient reads columns transposed: 800 wide, the transposed panel falls out of
the cache. Forward and gradient together take 15.1 ms in one group of 800, 14.7 in two, 12.7 in three, 13.6 in five."""


class Geometry:
    """Stride, padding and dilation along each spatial axis, and groups."""

    def __init__(self, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1) -> None:
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups


def suits(x: Value, geometry: Geometry) -> bool:
    """Whether a convolution of ``x`` goes by columns: one group, and channels enough for long runs."""
    return geometry.groups == 1 and x.static(1)[0] >= LEAST_RUN


def channels_last(b: Lowering, x: Value) -> str:
    """``[N, C, *spatial]`` -> ``[N, *spatial, C]``."""
    return b.transpose(x.name, [0, *range(2, x.rank), 1])


def channels_first(b: Lowering, name: str, rank: int) -> str:
    """``[N, *spatial, C]`` -> ``[N, C, *spatial]``."""
    return b.transpose(name, [0, rank - 1, *range(1, rank - 1)])


def gather(b: Lowering, x: Value, kernel: Sequence[int], sizes: Sequence[int], geometry: Geometry) -> list[str]:
    """The columns of ``x`` in groups of taps: ``[N * pixels, taps * C]`` each; equal calls become one node."""
    spatial = x.static(*range(2, x.rank))
    channels = x.static(1)[0]
    last = channels_last(b, x)
    padded = [size + 2 * p for size, p in zip(spatial, geometry.padding, strict=True)]
    if any(geometry.padding):
        last = b.op("Pad", last, b.ints([0, *geometry.padding, 0] * 2), b.scalar(0, x.dtype))
    if set(kernel) == {1} and set(geometry.stride) == {1}:
        return [b.op("Reshape", last, b.ints([-1, channels]))]
    flat = b.op("Reshape", last, b.ints([0, -1, channels]))
    # Where along each axis output o and tap t look; the table adds up the axes of the padded input.
    table: npt.NDArray[np.int64] = np.zeros((), np.int64)
    for axis, (k, n) in enumerate(zip(kernel, sizes, strict=True)):
        places = np.arange(n)[:, None] * geometry.stride[axis] + np.arange(k)[None] * geometry.dilation[axis]
        table = table[..., None, None] * padded[axis] + places
    n = len(kernel)
    table = table.transpose([*range(0, 2 * n, 2), *range(1, 2 * n, 2)]).reshape(math.prod(sizes), -1)
    return [
        b.op("Reshape", b.op("Gather", flat, b.constant(table[:, taps].ravel()), axis=1), b.ints([-1, width]))
        for taps, width in _groups(table.shape[1], channels)
    ]


def _groups(taps: int, channels: int) -> list[tuple[slice, int]]:
    """Even groups of taps, with their widths in columns."""
    count = -(-taps * channels // max(GROUP_WIDTH, channels))
    bounds = [round(i * taps / count) for i in range(count + 1)]
    return [(slice(i, j), (j - i) * channels) for i, j in itertools.pairwise(bounds)]


def product(b: Lowering, columns: Sequence[str], weight: Value, bias: Value | None, shape: Value) -> str:
    """The convolution ``[N, O, *sizes]``: products over groups of columns, each added to the one before."""
    outputs, inputs, *kernel = weight.static()
    taps = int(math.prod(kernel))
    rows = b.transpose(b.op("Reshape", weight.name, b.ints([outputs, inputs * taps])), [1, 0])
    # Rows by tap, then channel. By Gather: ONNX Runtime joins two Transposes to one, which is ten times slower.
    order = np.arange(inputs * taps).reshape(inputs, taps).T
    parts = [rows]
    if taps > 1:
        groups = [taken for taken, _ in _groups(taps, inputs)]
        parts = [b.op("Gather", rows, b.constant(order[taken].ravel()), axis=0) for taken in groups]
    total = [bias.name] if bias is not None else []
    for column, part in zip(columns, parts, strict=True):
        total = [b.op("Gemm", column, part, *total)]
    sizes = shape.static(*range(2, shape.rank))
    return channels_first(b, b.op("Reshape", total[0], b.ints([-1, *sizes, outputs])), shape.rank)


def weight_gradient(b: Lowering, columns: Sequence[str], grad: Value, weight: Value) -> str:
    """The gradient of the weights, ``[O, C, *kernel]``, from the columns and the output's gradient."""
    outputs, inputs, *kernel = weight.static()
    taps = int(math.prod(kernel))
    right = b.op("Reshape", channels_last(b, grad), b.ints([-1, outputs]))
    products = [b.op("Gemm", column, right, transA=1) for column in columns]
    rows = b.op("Concat", *products, axis=0) if len(products) > 1 else products[0]
    if taps > 1:
        rows = b.op("Gather", rows, b.constant(np.arange(taps * inputs).reshape(taps, inputs).T.ravel()), axis=0)
    return b.op("Reshape", b.transpose(rows, [1, 0]), b.ints([outputs, inputs, *kernel]))
