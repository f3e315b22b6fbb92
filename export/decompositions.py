"""Gradients that PyTorch neither decomposes nor traces at a symbolic batch size, in operators that have rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _shrink_backward(grad: Tensor, x: Tensor, width: float) -> Tensor:
    return grad * (torch.abs(x) > width).to(grad.dtype)


def _constant_pad(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    """``pads``: before and after of the last axis, then of the one before it, ...; negative numbers crop."""
    for i, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        axis = x.dim() - 1 - i
        if before < 0 or after < 0:
            x = x.narrow(axis, max(-before, 0), x.shape[axis] + min(before, 0) + min(after, 0))

        def block(size: int, of: Tensor = x, axis: int = axis) -> list[Tensor]:
            return [of.new_full((*of.shape[:axis], size, *of.shape[axis + 1 :]), value)] if size > 0 else []

        parts = [*block(before), x, *block(after)]
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


def _weight_norm_backward(
    grad: Tensor, direction: Tensor, length: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Of ``length * direction / |direction|``, the norm over all axes but ``dim`` (Salimans and Kingma 2016)."""
    axes = [axis for axis in range(direction.dim()) if axis != dim]
    along = (grad * direction).sum(axes, keepdim=True) / norms
    return length / norms * (grad - direction * (along / norms)), along


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.constant_pad_nd.default: _constant_pad,
    torch.ops.aten.hardshrink_backward.default: _shrink_backward,
    torch.ops.aten.softshrink_backward.default: _shrink_backward,
    torch.ops.aten._weight_norm_interface_backward.default: _weight_norm_backward,
}
"""ATen operator -> function; beside PyTorch's own table."""
