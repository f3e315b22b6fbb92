"""Gradients that PyTorch neither decomposes nor traces at a symbolic batch size, in operators that have rules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _shrink_backward(grad: Tensor, x: Tensor, width: float) -> Tensor:
    return grad * (torch.abs(x) > width).to(grad.dtype)


def _multi_margin_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    power: float,
    margin: float,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    """Of ``sum over j != y of max(0, margin - x[y] + x[j]) ** p / C``; ``reduction``: 0 none, 1 mean, 2 sum."""
    rows, places = x.reshape(-1, x.shape[-1]), target.reshape(-1, 1)
    excess = torch.relu(margin - rows.gather(1, places) + rows)
    slope = (excess > 0).to(x.dtype) if power == 1 else 2 * excess
    slope = slope.scatter(1, places, 0.0) / rows.shape[1]
    if weight is not None:
        slope = slope * weight[places]
    slope = slope.scatter(1, places, -slope.sum(1, keepdim=True))
    if reduction == 1:
        slope = slope / rows.shape[0]
    return (slope * grad.reshape(-1, 1)).reshape(x.shape)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.hardshrink_backward.default: _shrink_backward,
    torch.ops.aten.softshrink_backward.default: _shrink_backward,
    torch.ops.aten.multi_margin_loss_backward.default: _multi_margin_backward,
}
"""ATen operator -> function; beside PyTorch's own table."""
