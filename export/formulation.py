"""What a formulation of convolution is: one way to compute it with its gradients, and the layouts it may work in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from export.lower import Lowering


@dataclass(frozen=True)
class Layer:
    """A convolution ``[N, C, *sizes]`` -> ``[N, O, *results]`` with weights ``[O, C / groups, *kernel]``."""

    inputs: int
    outputs: int
    sizes: tuple[int, ...]
    results: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[O, C / groups, *kernel]``."""
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return self.groups == self.inputs == self.outputs > 1

    @property
    def span(self) -> tuple[int, ...]:
        """How far a dilated kernel reaches along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def __str__(self) -> str:
        text = f"{self.inputs}->{self.outputs} {_by(self.kernel)} on {_by(self.sizes)}"
        text += f" stride {_by(self.stride)}" if set(self.stride) != {1} else ""
        return text + (f" groups {self.groups}" if self.groups > 1 else "")


class Formulation(Protocol):
    """One way to compute a convolution and its gradients. Tensors are in PyTorch's order, channels second."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def convolve(self, b: Lowering, x: str, weight: str) -> str:
        """``[N, C, *sizes]`` -> ``[N, O, *results]``."""

    def toward_input(self, b: Lowering, grad: str, weight: str) -> str:
        """The gradient of the input, from ``grad [N, O, *results]``."""

    def toward_weight(self, b: Lowering, grad: str, x: str) -> str:
        """The gradient of the weights, ``[O, C / groups, *kernel]``."""


def to_spatial_major(b: Lowering, name: str, rank: int) -> str:
    """``[N, C, *spatial]`` -> ``[*spatial, N, C]``: what is between transforms of the axes needs no copies."""
    return b.transpose(name, [*range(2, rank), 0, 1])


def from_spatial_major(b: Lowering, name: str, rank: int) -> str:
    """``[*spatial, N, C]`` -> ``[N, C, *spatial]``."""
    return b.transpose(name, [rank - 2, rank - 1, *range(rank - 2)])


def to_channel_major(b: Lowering, name: str, rank: int) -> str:
    """``[N, C, *spatial]`` -> ``[C, *spatial, N]``: each channel is one run of memory."""
    return b.transpose(name, [*range(1, rank), 0])


def from_channel_major(b: Lowering, name: str, rank: int) -> str:
    """``[C, *spatial, N]`` -> ``[N, C, *spatial]``."""
    return b.transpose(name, [rank - 1, *range(rank - 1)])


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
