"""The gradients of convolution, in the form that ONNX Runtime computes fastest.

Formulas: the input's gradient is a transposed convolution of the output's gradient with the same weights; the weight's
is a matrix product, for each tap of the kernel, of the input that the tap sees with the output's gradient.
"""

import itertools
import math
from collections.abc import Sequence

from edge_client.errors import ExportError
from export import columns, widened
from export.lower import Lowering, Rule, Value
from export.operators import convolution
from export.pooling import Tiled, tiling_window

FEW_CHANNELS = 4
"""Up to so many input channels, a tap sees runs too short to copy fast and too few for a matrix product."""


def _forward(
    b: Lowering,
    out: Value,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str | Value:
    geometry = Geometry(stride, padding, dilation, groups)
    if transposed and any(extra >= s for extra, s in zip(output_padding, stride, strict=True)):
        raise ExportError(
            f"output_padding {list(output_padding)} reaches the stride {list(stride)}, which ONNX Runtime refuses; "
            "use less output_padding and pad the result with F.pad"
        )
    # Without a backward pass the columns serve once, and evaluation runs large batches: Conv needs little memory.
    if b.differentiated and not transposed and columns.suits(x, geometry):
        spatial = range(2, x.rank)
        found = columns.gather(b, x, weight.static(*spatial), out.static(*spatial), geometry)
        return columns.product(b, found, weight, bias, out)
    whole = convolution(b, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    window = tiling_window(b, out) if b.differentiated and not transposed else None
    if window is not None and widened.suits(x, weight, window, geometry):
        return Tiled(whole, out.shape, out.dtype, widened.slabs(b, x, weight, bias, window, geometry), tuple(window))
    return whole


def _backward(
    b: Lowering,
    out: Sequence[Value],
    grad: Value,
    x: Value,
    weight: Value,
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[str | None, ...]:
    geometry = Geometry(stride, padding, dilation, groups)
    name = grad.name
    toward_weight: str | None
    if isinstance(grad, Tiled) and not transposed:
        toward_input = geometry.transposed(b, grad, weight, x) if mask[0] else None
        toward_weight = widened.weight_gradient(b, grad, x, weight, geometry) if mask[1] else None
        name = grad.total
    elif transposed:
        toward_input = geometry.convolve(b, name, weight.name) if mask[0] else None
        toward_weight = geometry.weight_gradient(b, x, grad, weight) if mask[1] else None
    else:
        toward_input = geometry.transposed(b, grad, weight, x) if mask[0] else None
        toward_weight = geometry.weight_gradient(b, grad, x, weight) if mask[1] else None
    axes = [0, *range(2, grad.rank)]
    return toward_input, toward_weight, b.reduce("ReduceSum", name, axes) if mask[2] else None


class Geometry(columns.Geometry):
    """The products of a convolution with the gradients around it."""

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """The plain convolution."""
        return b.op(
            "Conv",
            x,
            weight,
            strides=self.stride,
            pads=self.padding * 2,
            dilations=self.dilation,
            group=self.groups,
        )

    def transposed(self, b: Lowering, grad: Value, weight: Value, x: Value) -> str:
        """The transposed convolution that takes ``grad`` back to the sizes of ``x``."""
        spatial = range(2, x.rank)
        extra = [
            size - ((got - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, got, k, s, p, d in zip(
                x.static(*spatial),
                grad.static(*spatial),
                weight.static(*spatial),
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        ]
        return b.op(
            "ConvTranspose",
            grad.name,
            weight.name,
            strides=self.stride,
            pads=self.padding * 2,
            dilations=self.dilation,
            group=self.groups,
            output_padding=extra,
        )

    def weight_gradient(self, b: Lowering, grad: Value, x: Value, weight: Value) -> str:
        """The gradient of the weights of ``grad``'s shape's convolution of ``x``: ``[out, in / groups, *kernel]``."""
        out_channels, in_channels = grad.static(1)[0], x.static(1)[0]
        if self.groups == 1 and in_channels <= FEW_CHANNELS:
            return self._by_convolution(b, grad, x, weight)
        if self.groups == 1:
            found = columns.gather(b, x, weight.static(*range(2, weight.rank)), grad.static(*range(2, grad.rank)), self)
            return columns.weight_gradient(b, found, grad, weight)
        if self.groups == in_channels == out_channels:
            return self._by_taps(b, grad, x, weight)
        return self._by_groups(b, grad, x, weight)

    def _taps(self, b: Lowering, grad: Value, x: Value, spatial: Sequence[int], weight: Value) -> list[str]:
        """``x`` as every weight of the kernel sees it: one slice of the grad's spatial size for each."""
        padded = x.name
        if any(self.padding):
            pads = [0] * x.rank * 2
            for axis, p in zip(spatial, self.padding, strict=True):
                pads[axis] = pads[x.rank + axis] = p
            padded = b.op("Pad", x.name, b.ints(pads), b.scalar(0, x.dtype))
        reach = [(n - 1) * s + 1 for n, s in zip(grad.static(*range(2, grad.rank)), self.stride, strict=True)]
        kernel = weight.static(*range(2, weight.rank))
        slices = []
        for tap in itertools.product(*[range(k) for k in kernel]):
            starts = [i * d for i, d in zip(tap, self.dilation, strict=True)]
            ends = [start + n for start, n in zip(starts, reach, strict=True)]
            steps = [] if set(self.stride) == {1} else [b.ints(self.stride)]
            slices.append(b.op("Slice", padded, b.ints(starts), b.ints(ends), b.ints(spatial), *steps))
        return slices

    def _by_convolution(self, b: Lowering, grad: Value, x: Value, weight: Value) -> str:
        # The output's gradient as kernel over the input, batch and channels swapped; stride and dilation change places.
        swap = [1, 0, *range(2, x.rank)]
        result = b.op(
            "Conv",
            b.transpose(x.name, swap),
            b.transpose(grad.name, swap),
            strides=self.dilation,
            pads=self.padding * 2,
            dilations=self.stride,
        )
        spatial = range(2, x.rank)
        kernel = weight.static(*spatial)
        # A remainder of the stride leaves rows that belong to no weight.
        cut = b.op("Slice", result, b.ints([0] * len(kernel)), b.ints(kernel), b.ints(spatial))
        return b.transpose(cut, swap)

    def _by_taps(self, b: Lowering, grad: Value, x: Value, weight: Value) -> str:
        kernel = weight.static(*range(2, weight.rank))
        axes = [0, *range(2, x.rank)]
        sums = [
            b.reduce("ReduceSum", b.op("Mul", tap, grad.name), axes)
            for tap in self._taps(b, grad, x, range(2, x.rank), weight)
        ]
        stacked = b.op("Concat", *[b.op("Unsqueeze", s, b.ints([-1])) for s in sums], axis=-1)
        return b.op("Reshape", stacked, b.ints([x.static(1)[0], 1, *kernel]))

    def _by_groups(self, b: Lowering, grad: Value, x: Value, weight: Value) -> str:
        # For each tap a product of [inputs, pixels] with [pixels, outputs], batched over samples and groups. As fast as
        # one product over all taps, without the columns; a grouped Conv takes 1.3 to 6 times longer.
        spatial = range(2, x.rank)
        outputs, inputs, *kernel = weight.static()
        pixels = math.prod(grad.static(*range(2, grad.rank)))
        each = outputs // self.groups
        right = b.transpose(b.reshape(grad.name, [grad.shape[0], self.groups, each, pixels]), [0, 1, 3, 2])
        products = [
            b.op("MatMul", b.reshape(tap, [x.shape[0], self.groups, inputs, pixels]), right)
            for tap in self._taps(b, grad, x, spatial, weight)
        ]
        joined = b.op("Concat", *products, axis=2) if len(products) > 1 else products[0]
        rows = b.reshape(b.reduce("ReduceSum", joined, [0]), [self.groups, math.prod(kernel), inputs, each])
        return b.reshape(b.transpose(rows, [0, 3, 2, 1]), [outputs, inputs, *kernel])


CONVOLUTION: dict[str, Rule] = {"aten.convolution": _forward, "aten.convolution_backward": _backward}
