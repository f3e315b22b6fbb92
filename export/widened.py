"""A convolution of few channels before max-pooling that tiles: one convolution for each position in the window.

The output at position ``a`` of every window is a convolution whose stride is ``window`` times as long and whose kernel
starts ``a`` strides later. All positions at once are one convolution with as many times the channels, whose kernel has
zeros where a position does not look. Its output comes as the slabs that pooling and the pooling's gradient work on, so
nothing is cut apart, transposed or joined; and fewer, longer rows suit the weight's gradient.

With [32, 1, 28, 28] to 32 channels, 5x5, pool 2: 44 % more arithmetic, which is little with few channels, and a
good half of the time (forward, pooling and all gradients, one thread: 4.9 ms against 8.5).
"""

import itertools
import math
from collections.abc import Sequence

from export.columns import Geometry
from export.lower import Lowering, Value
from export.pooling import Tiled

MOST_CHANNELS = 4
"""With more input channels, columns are gathered fast and zeros in the kernel cost more than the passes they save."""

MOST_WIDENING = 2
"""Largest growth of the kernel's area."""


def suits(x: Value, weight: Value, window: Sequence[int], geometry: Geometry) -> bool:
    """Whether the kernel of a convolution of ``x`` may grow by the pooling window that follows."""
    kernel = weight.static(*range(2, weight.rank))
    few = x.static(1)[0] <= MOST_CHANNELS and geometry.groups == 1 and set(geometry.dilation) == {1}
    return few and math.prod(_wide(kernel, window, geometry)) <= MOST_WIDENING * math.prod(kernel)


def slabs(
    b: Lowering, x: Value, weight: Value, bias: Value | None, window: Sequence[int], geometry: Geometry
) -> tuple[str, ...]:
    """The convolution of ``x`` at each position in the pooling window: ``[N, O, *pooled]`` each."""
    outputs, _, *kernel = weight.static()
    starts = _starts(window, geometry)
    wide = _wide(kernel, window, geometry)
    kernels = []
    for start in starts:
        end = [w - k - s for w, k, s in zip(wide, kernel, start, strict=True)]
        pads = b.ints([0, 0, *start, 0, 0, *end])
        kernels.append(b.op("Pad", weight.name, pads, b.scalar(0, weight.dtype)))
    biases = [b.op("Concat", *[bias.name] * len(starts), axis=0)] if bias is not None else []
    joined = b.op(
        "Conv",
        x.name,
        b.op("Concat", *kernels, axis=0),
        *biases,
        strides=_strides(window, geometry),
        pads=geometry.padding * 2,
    )
    return tuple(b.ops("Split", len(starts), joined, b.ints([outputs] * len(starts)), axis=1))


def weight_gradient(b: Lowering, grad: Tiled, x: Value, weight: Value, geometry: Geometry) -> str:
    """The gradient of the weights, ``[O, C, *kernel]``, from the slabs of the output's gradient."""
    outputs, _, *kernel = weight.static()
    window = grad.window
    swap = [1, 0, *range(2, x.rank)]
    # The output's gradient as kernel over the input, batch and channels swapped; the stride becomes the dilation.
    result = b.op(
        "Conv",
        b.transpose(x.name, swap),
        b.transpose(b.op("Concat", *grad.slabs, axis=1), swap),
        pads=geometry.padding * 2,
        dilations=_strides(window, geometry),
    )
    axes = b.ints(range(1, x.rank))
    parts = []
    for i, start in enumerate(_starts(window, geometry)):
        first = [i * outputs, *start]
        last = [(i + 1) * outputs, *[s + k for s, k in zip(start, kernel, strict=True)]]
        parts.append(b.op("Slice", result, b.ints(first), b.ints(last), axes))
    return b.transpose(b.op("Sum", *parts), swap)


def _starts(window: Sequence[int], geometry: Geometry) -> list[list[int]]:
    """Where the kernel of each position begins, in the order of the pooling's slabs."""
    places = itertools.product(*[range(k) for k in window])
    return [[p * s for p, s in zip(place, geometry.stride, strict=True)] for place in places]


def _wide(kernel: Sequence[int], window: Sequence[int], geometry: Geometry) -> list[int]:
    return [k + (w - 1) * s for k, w, s in zip(kernel, window, geometry.stride, strict=True)]


def _strides(window: Sequence[int], geometry: Geometry) -> list[int]:
    return [w * s for w, s in zip(window, geometry.stride, strict=True)]
