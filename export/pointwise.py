"""Convolution whose kernel is one pixel: a matrix product over all pixels."""

from dataclasses import dataclass

from export import formulation as f
from export.lower import Lowering


@dataclass(frozen=True)
class Pointwise:
    """Rows are pixels, ``[pixels * N, C]``; or, where a depthwise convolution is near, columns are."""

    layer: f.Layer
    channel_major: bool
    name = "pointwise"

    @staticmethod
    def suits(layer: f.Layer) -> bool:
        """Whether it can compute the layer."""
        return layer.taps == 1 and layer.groups == 1 and set(layer.stride) == {1} and not any(layer.padding)

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """See `Formulation`."""
        return self._product(b, x, weight, self.layer.inputs, self.layer.outputs, False)

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """See `Formulation`."""
        return self._product(b, grad, weight, self.layer.outputs, self.layer.inputs, True)

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """See `Formulation`."""
        left, right = self._flat(b, grad, self.layer.outputs), self._flat(b, x, self.layer.inputs)
        product = b.op("Gemm", left, right, **({"transB": 1} if self.channel_major else {"transA": 1}))
        return b.op("Reshape", product, b.ints(self.layer.weight_shape))

    def _product(self, b: Lowering, x: str, weight: str, before: int, after: int, backward: bool) -> str:
        matrix = b.op("Reshape", weight, b.ints(self.layer.weight_shape[:2]))
        flat, rank = self._flat(b, x, before), len(self.layer.sizes) + 2
        if self.channel_major:
            product = b.op("Gemm", matrix, flat, transA=int(backward))
            return f.from_channel_major(b, b.op("Reshape", product, b.ints([after, *self.layer.sizes, -1])), rank)
        product = b.op("Gemm", flat, matrix, transB=int(not backward))
        return f.from_spatial_major(b, b.op("Reshape", product, b.ints([*self.layer.sizes, -1, after])), rank)

    def _flat(self, b: Lowering, name: str, channels: int) -> str:
        rank = len(self.layer.sizes) + 2
        if self.channel_major:
            return b.op("Reshape", f.to_channel_major(b, name, rank), b.ints([channels, -1]))
        return b.op("Reshape", f.to_spatial_major(b, name, rank), b.ints([-1, channels]))
