"""Bags of embeddings: rows of a table looked up, then reduced."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError


def embedding_bag(
    input: Tensor,  # noqa: A002 - PyTorch's name, which callers may use
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The signature and the result of `torch.nn.functional.embedding_bag`, for bags ``[N, B]`` of one size.

    Raises:
        ExportError: bags of several sizes, or an option without a formulation here.
    """
    if input.dim() != 2 or offsets is not None:
        raise ExportError(
            "an embedding bag with offsets is not supported; give indices [N, B], padded with padding_idx"
        )
    if max_norm is not None or scale_grad_by_freq:
        raise ExportError("an embedding bag with max_norm or scale_grad_by_freq is not supported; leave them out")
    rows = F.embedding(input, weight, padding_idx)
    if padding_idx is None:
        if mode == "max":
            return rows.amax(1)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        return rows.sum(1) if mode == "sum" else rows.mean(1)
    if mode == "max":
        raise ExportError("an embedding bag with mode='max' and padding_idx is not supported; use 'sum' or 'mean'")
    kept = (input != padding_idx).to(rows.dtype)
    factors = kept if per_sample_weights is None else kept * per_sample_weights
    total = (rows * factors.unsqueeze(-1)).sum(1)
    return total if mode == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1)


class EmbeddingMode(TorchFunctionMode):
    """While active, `torch.nn.functional.embedding_bag` is computed from lookups."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace bags of embeddings, pass all other functions on."""
        if func is torch.nn.functional.embedding_bag:
            return embedding_bag(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
