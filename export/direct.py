"""Convolution by ONNX's own operators, with gradients to match: whatever no faster formulation suits.

The input's gradient is a transposed convolution of the output's gradient with the same weights. The weights' gradient
is a convolution of the input with the output's gradient as kernel, batch and channels exchanged; for grouped ones a
matrix product for each tap of the kernel.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from export.formulation import Layer
from export.lower import Lowering


@dataclass(frozen=True)
class Direct:
    """`Conv` and `ConvTranspose`."""

    layer: Layer
    name = "direct"

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`."""
        layer = self.layer
        result = b.op(
            "Conv",
            x,
            weight,
            strides=list(layer.stride),
            pads=list(layer.padding * 2),
            dilations=list(layer.dilation),
            group=layer.groups,
        )
        # A transposed convolution may have left out more than a stride of what it could have made.
        if any(extra >= s for extra, s in zip(self._extra, layer.stride, strict=True)):
            return b.slice(result, self._spatial, [0] * len(layer.results), layer.results)
        return result

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """See `Formulation`."""
        layer = self.layer
        # ConvTranspose takes no output_padding that reaches the stride: then crop less, and what is beyond is zero.
        beyond = [extra if extra >= s else 0 for extra, s in zip(self._extra, layer.stride, strict=True)]
        ends = [p - n for p, n in zip(layer.padding, beyond, strict=True)]
        result = b.op(
            "ConvTranspose",
            grad,
            weight,
            strides=list(layer.stride),
            pads=[*layer.padding, *(max(n, 0) for n in ends)],
            dilations=list(layer.dilation),
            group=layer.groups,
            output_padding=[extra - n for extra, n in zip(self._extra, beyond, strict=True)],
        )
        if min(ends) < 0:
            pads = [0] * (len(ends) + 4) + [max(-n, 0) for n in ends]
            result = b.op("Pad", result, b.ints(pads), b.scalar(0, "float32"))
        return result

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        if self.layer.groups == 1:
            return self._by_convolution(b, grad, x)
        return self._by_taps(b, grad, x) if self.layer.depthwise else self._by_groups(b, grad, x)

    @property
    def _extra(self) -> list[int]:
        """How much longer the input is than the least that makes the results."""
        layer = self.layer
        return [
            size - ((got - 1) * s - 2 * p + span)
            for size, got, s, p, span in zip(
                layer.sizes, layer.results, layer.stride, layer.padding, layer.span, strict=True
            )
        ]

    @property
    def _spatial(self) -> range:
        return range(2, len(self.layer.sizes) + 2)

    def _by_convolution(self, b: Lowering, grad: str, x: str) -> str:
        # Stride and dilation change places.
        layer, swap = self.layer, [1, 0, *self._spatial]
        result = b.op(
            "Conv",
            b.transpose(x, swap),
            b.transpose(grad, swap),
            strides=list(layer.dilation),
            pads=list(layer.padding * 2),
            dilations=list(layer.stride),
        )
        # A remainder of the stride leaves rows that belong to no weight.
        return b.transpose(b.slice(result, self._spatial, [0] * len(layer.kernel), layer.kernel), swap)

    def _slices(self, b: Lowering, x: str) -> list[str]:
        """``x`` as every tap of the kernel sees it, ``[N, C, *results]`` each."""
        layer = self.layer
        if any(layer.padding):
            x = b.op("Pad", x, b.ints([0, 0, *layer.padding] * 2), b.scalar(0, "float32"))
        reach = [(n - 1) * s + 1 for n, s in zip(layer.results, layer.stride, strict=True)]
        slices = []
        for tap in itertools.product(*map(range, layer.kernel)):
            starts = [i * d for i, d in zip(tap, layer.dilation, strict=True)]
            ends = [start + n for start, n in zip(starts, reach, strict=True)]
            steps = [] if set(layer.stride) == {1} else [b.ints(layer.stride)]
            slices.append(b.op("Slice", x, b.ints(starts), b.ints(ends), b.ints(self._spatial), *steps))
        return slices

    def _by_taps(self, b: Lowering, grad: str, x: str) -> str:
        axes = [0, *self._spatial]
        sums = [b.reduce("ReduceSum", b.op("Mul", tap, grad), axes) for tap in self._slices(b, x)]
        stacked = b.op("Concat", *[b.op("Unsqueeze", s, b.ints([-1])) for s in sums], axis=-1)
        return b.op("Reshape", stacked, b.ints(self.layer.weight_shape))

    def _by_groups(self, b: Lowering, grad: str, x: str) -> str:
        # For each tap a product of [inputs, pixels] with [pixels, outputs], batched over samples and groups. As fast as
        # one product over all taps, without the columns; a grouped Conv takes 1.3 to 6 times longer.
        layer = self.layer
        outputs, inputs, *kernel = layer.weight_shape
        each, pixels = outputs // layer.groups, math.prod(layer.results)
        right = b.transpose(b.op("Reshape", grad, self._grouped(b, each, pixels)), [0, 1, 3, 2])
        products = [
            b.op("MatMul", b.op("Reshape", tap, self._grouped(b, inputs, pixels)), right) for tap in self._slices(b, x)
        ]
        joined = b.op("Concat", *products, axis=2) if len(products) > 1 else products[0]
        shape: Sequence[int] = [layer.groups, layer.taps, inputs, each]
        rows = b.op("Reshape", b.reduce("ReduceSum", joined, [0]), b.ints(shape))
        return b.op("Reshape", b.transpose(rows, [0, 3, 2, 1]), b.ints([outputs, inputs, *kernel]))

    def _grouped(self, b: Lowering, channels: int, pixels: int) -> str:
        return b.ints([-1, self.layer.groups, channels, pixels])
