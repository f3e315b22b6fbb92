"""Attention, written out: few passes over memory, and gradients that autograd finds.

PyTorch's own kernels (fused ones above all) hide their steps from tracing and have no gradient in ATen operators.
Formulas: Vaswani et al. 2017 (arXiv 1706.03762). A row of scores that is masked everywhere gives zeros, as in
`torch.nn.functional.scaled_dot_product_attention`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError

Drop = Callable[[Tensor, float], Tensor]
"""``drop(x, p)``: what dropout makes of ``x``."""

FLOOR = -1e30
"""Added to a masked score: nothing outweighs it, and a whole row of them, or the sum of two, stays finite."""

LOWEST = -60.0
"""A score this far below the largest weighs 1e-26, which is no part of a float32 sum. Exponents below -87 would lead
through denormal numbers, which take x86 processors eight times as long."""


class _Floored(torch.autograd.Function):
    """Scores, none of them further than `LOWEST` from its row's largest; the gradient passes, its weight is nothing."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return torch.maximum(scores, scores.amax(-1, keepdim=True) + LOWEST)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, drop: Drop, p: float) -> tuple[Tensor, ...]:
    """``softmax(query key^T + bias) value``, with dropout of the weights: results and weights.

    ``[*lead, T, D]``, ``[*lead, S, D]``, ``[*lead, S, V]``, bias broadcast to ``[*lead, T, S]``; the scores' scale is
    up to the caller, who may have it in a smaller tensor.
    """
    lead, rows, columns = query.shape[:-2], query.shape[-2], key.shape[-2]
    # Three dimensions: a transpose right before a product becomes a flag of the product in ONNX Runtime.
    flat = [x.reshape(math.prod(lead), *x.shape[-2:]) for x in (query, key, value)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    if bias is not None:
        masked: Tensor = _Floored.apply(scores.view(*lead, rows, columns) + bias)  # type: ignore[no-untyped-call]
        scores = masked.view(scores.shape)
    weights = torch.softmax(scores, -1)
    if p > 0:
        weights = drop(weights.view(*lead, rows, columns), p).view(scores.shape)
    result = torch.bmm(weights, flat[2]).view(*lead, rows, value.shape[-1])
    return result, weights.view(*lead, rows, columns)


def alive(bias: Tensor) -> Tensor:
    """1 for rows of scores that have an unmasked element, else 0."""
    return (bias.detach().amax(-1, keepdim=True) > FLOOR / 2).to(bias.dtype)


def additive(mask: Tensor, masked: bool) -> Tensor:
    """A mask as what is added to scores; ``masked`` is what a boolean mask says where nothing may be seen."""
    if mask.dtype == torch.bool:
        hidden = mask if masked else mask.logical_not()
        return hidden.to(torch.float32) * FLOOR
    return mask.clamp(min=FLOOR)


def causal(rows: int, columns: int) -> Tensor:
    """The bias that hides every column after the row."""
    return additive(torch.arange(columns) > torch.arange(rows).unsqueeze(1), masked=True)


def scaled_dot_product(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The signature and the result of `torch.nn.functional.scaled_dot_product_attention`."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    lead = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        query.shape[:-2], key.shape[:-2], value.shape[:-2]
    )
    query, key, value = (x.expand(*lead, *x.shape[-2:]) for x in (query, key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    bias = additive(attn_mask, masked=False) if attn_mask is not None else None
    if is_causal:
        bias = causal(query.shape[-2], key.shape[-2])
    result = attend(query * factor, key, value, bias, drop, dropout_p)[0]
    return result * alive(bias) if bias is not None and not is_causal else result


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def bound(args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `torch.nn.functional.multi_head_attention_forward` by name."""
    given = _SIGNATURE.bind(*args, **named)
    given.apply_defaults()
    return dict(given.arguments)


def multi_head(drop: Drop, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The result of `torch.nn.functional.multi_head_attention_forward`.

    Raises:
        ExportError: an option that has no formulation here.
    """
    for option in ("bias_k", "bias_v", "static_k", "static_v"):
        if given[option] is not None:
            raise ExportError(f"multi-head attention with {option} is not supported; use add_bias_kv=False")
    if given["add_zero_attn"]:
        raise ExportError("multi-head attention with add_zero_attn=True is not supported; use False")
    inputs = [given[name] for name in ("query", "key", "value")]
    if inputs[0].dim() != 3:
        raise ExportError(
            f"multi-head attention has a query of {inputs[0].dim()} dimensions; expected 3, a batch of sequences"
        )
    heads, p = given["num_heads"], given["dropout_p"] if given["training"] else 0.0
    width = inputs[0].shape[-1]
    factor = 1 / math.sqrt(width // heads)
    parts = []
    for x, weight, bias, scale in zip(inputs, *_projections(given), (factor, 1.0, 1.0), strict=True):
        # The scale goes into the weights, which are smaller than what comes out of them.
        w, b = weight * scale, bias * scale if bias is not None else None
        # nn.MultiheadAttention puts the sequence first; where it only turned its input, turn it back.
        turned = x.transpose(0, 1)
        projected = F.linear(turned, w, b) if turned.is_contiguous() else F.linear(x, w, b).transpose(0, 1)
        parts.append(projected.view(*projected.shape[:2], heads, width // heads).transpose(1, 2))
    bias = _bias(given, heads, parts[0].shape[0])
    result, weights = attend(parts[0], parts[1], parts[2], bias, drop, p)
    if bias is not None:
        result = result * alive(bias)
    joined = result.transpose(1, 2).flatten(2)
    output = F.linear(joined, given["out_proj_weight"], given["out_proj_bias"]).transpose(0, 1)
    if not given["need_weights"]:
        return output, None
    return output, weights.mean(1) if given["average_attn_weights"] else weights


def _projections(given: Mapping[str, Any]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    if given["use_separate_proj_weight"]:
        weights = [given[f"{part}_proj_weight"] for part in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    bias = given["in_proj_bias"]
    return weights, [None] * 3 if bias is None else list(bias.chunk(3))


def _bias(given: Mapping[str, Any], heads: int, batch: int) -> Tensor | None:
    """Both masks as one bias, broadcast to ``[N, heads, T, S]``."""
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    bias = additive(mask, masked=True) if mask is not None else None
    if bias is not None and bias.dim() == 3:
        bias = bias.view(batch, heads, *bias.shape[1:]) if bias.shape[0] != 1 else bias.unsqueeze(0)
    if padding is not None:
        hidden = additive(padding, masked=True).unsqueeze(1).unsqueeze(1)
        bias = hidden if bias is None else bias + hidden
    return bias


class AttentionMode(TorchFunctionMode):
    """While active, attention is computed step by step; dropout of its weights is `DropoutMode`'s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace attention, pass all other functions on."""
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return scaled_dot_product(_no_dropout, *args, **named)
        if name == "multi_head_attention_forward":
            return multi_head(_no_dropout, bound(args, named))
        return func(*args, **named)


def _no_dropout(x: Tensor, p: float) -> Tensor:
    raise ExportError(f"attention drops weights with p={p:g}, but this step takes no seed; use dropout=0")
