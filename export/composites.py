"""Functions of torch as tracing sees them: their own way fixes the batch size, hides in a kernel or divides by zero."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError


class CompositeMode(TorchFunctionMode):
    """While active, the functions of `WRITTEN_OUT` are made of operators that have rules."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace those, pass all other functions on."""
        instead: Callable[..., Any] = WRITTEN_OUT.get(func, func)
        return instead(*args, **(kwargs or {}))


def _take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    if dim is None:
        return x.flatten()[indices.flatten()]
    axis = dim % x.dim()
    if indices.dim() != x.dim():
        raise ExportError(f"take_along_dim of {x.dim()} axes by indices of {indices.dim()}; give as many")
    pairs = list(zip(x.shape, indices.shape, strict=True))
    # Only a size of one is repeated; the batch may be among the others.
    wide = [j if i == axis or _is_one(n) else n for i, (n, j) in enumerate(pairs)]
    tall = [n if i == axis or not _is_one(n) else j for i, (n, j) in enumerate(pairs)]
    return x.expand(tall).gather(axis, indices.expand(wide))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    outputs, rows, columns = weight.shape
    half = first @ weight.permute(1, 0, 2).reshape(rows, outputs * columns)
    result: Tensor = (half.view(*half.shape[:-1], outputs, columns) * second.unsqueeze(-2)).sum(-1)
    return result if bias is None else result + bias


def _cdist(first: Tensor, second: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    result: Tensor = torch.linalg.vector_norm(first.unsqueeze(-2) - second.unsqueeze(-3), p, -1)
    return result


def _lp_pool(average: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """The root of an empty window has no slope: PyTorch selects zero, a mask would multiply infinity by zero."""

    def pool(
        x: Tensor,
        norm_type: float,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        ceil_mode: bool = False,
    ) -> Tensor:
        kernel = [kernel_size] * rank if isinstance(kernel_size, int) else list(kernel_size)
        total = average(x.pow(norm_type), kernel_size, stride, 0, ceil_mode) * math.prod(kernel)
        empty = total == 0
        return torch.where(empty, 0.0, torch.where(empty, 1.0, total).pow(1 / norm_type))

    return pool


def _rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if training:
        raise ExportError("RReLU draws its slopes at random, which is not covered; use nn.LeakyReLU or nn.PReLU")
    return F.leaky_relu(x, (lower + upper) / 2)


def _multi_margin(
    x: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: object = None,
    reduce: object = None,
    reduction: str = "mean",
) -> Tensor:
    """PyTorch's kernel gives no gradient where a margin is just kept; its decomposition does."""
    places = target.unsqueeze(-1)
    excess = torch.relu(margin - x.gather(-1, places) + x)
    others = torch.arange(x.shape[-1]) != places
    losses = torch.where(others, excess if p == 1 else excess * excess, 0.0)
    losses = (losses if weight is None else losses * weight[places]).sum(-1) / x.shape[-1]
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


WRITTEN_OUT: Mapping[Any, Callable[..., Tensor]] = {
    torch.take_along_dim: _take_along_dim,
    Tensor.take_along_dim: _take_along_dim,
    # Of real numbers the same.
    torch.sgn: torch.sign,
    Tensor.sgn: torch.sign,
    F.bilinear: _bilinear,
    torch.cdist: _cdist,
    F.lp_pool1d: _lp_pool(F.avg_pool1d, 1),
    F.lp_pool2d: _lp_pool(F.avg_pool2d, 2),
    F.lp_pool3d: _lp_pool(F.avg_pool3d, 3),
    F.rrelu: _rrelu,
    F.multi_margin_loss: _multi_margin,
}
"""Function of torch -> what is traced instead."""
