"""Losses by name, with the sums that evaluation reports and the targets they take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_client.errors import ExportError
from edge_client.manifest import Feature

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """A mean loss, how it is written for tracing, how PyTorch writes it, and what is counted beside it.

    ``traced`` and ``reference`` take ``(outputs, *targets)`` and return a scalar. ``count`` is the number of
    predictions of a batch: elements of the target for the named losses, rows for a callable. ``metrics`` returns sums.
    """

    name: str
    traced: LossFunction
    reference: LossFunction
    metrics: Callable[..., dict[str, Tensor]]
    names: tuple[str, ...]
    per_element: bool
    target_dtype: str | None
    output_name: str

    def targets(self, outputs: tuple[int, ...]) -> tuple[Feature, ...]:
        """The target that goes with outputs of the given shape (without the batch dimension)."""
        if self.target_dtype == "int64":
            return (Feature("y", outputs[:-1], "int64"),)
        return (Feature("y", outputs, "float32"),)


class _CrossEntropy(torch.autograd.Function):
    # softmax - onehot in one go: autograd's way through log_softmax costs five more passes over the logits.
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, -1)
        onehot = (torch.arange(logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)).to(logits.dtype)
        ctx.save_for_backward(log_p, onehot)
        ctx.rows = targets.numel()
        return -(log_p * onehot).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log_p, onehot = ctx.saved_tensors
        rows = ctx.rows
        return (torch.exp(log_p) - onehot) * (grads[0] / rows), None


def _traced_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    result: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return result


def _reference_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class _BinaryCrossEntropy(torch.autograd.Function):
    # sigmoid - target: autograd's way through relu and abs is wrong by a half where a logit is exactly zero.
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return (torch.relu(logits) - logits * targets + torch.log1p(torch.exp(-torch.abs(logits)))).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        return (torch.sigmoid(logits) - targets) * (grads[0] / logits.numel()), None


def _traced_bce(logits: Tensor, targets: Tensor) -> Tensor:
    result: Tensor = _BinaryCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return result


def _correct_classes(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"correct": (logits.argmax(-1) == targets).to(torch.float32).sum()}


def _correct_bits(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"correct": ((logits > 0) == (targets > 0.5)).to(torch.float32).sum()}


def _errors(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    difference = outputs - targets
    return {"squared_error": (difference * difference).sum(), "absolute_error": difference.abs().sum()}


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        "cross_entropy",
        _traced_cross_entropy,
        _reference_cross_entropy,
        _correct_classes,
        ("correct",),
        True,
        "int64",
        "logits",
    ),
    "bce_with_logits": Loss(
        "bce_with_logits",
        _traced_bce,
        F.binary_cross_entropy_with_logits,
        _correct_bits,
        ("correct",),
        True,
        "float32",
        "logits",
    ),
    "mse": Loss("mse", F.mse_loss, F.mse_loss, _errors, ("squared_error", "absolute_error"), True, "float32", "output"),
}


def resolve_loss(loss: str | LossFunction) -> Loss:
    """A loss by its name, or any callable ``(outputs, *targets) -> scalar mean``.

    Raises:
        ExportError: no loss has that name.
    """
    if callable(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        return Loss(name, loss, loss, lambda *_: {}, (), False, None, "output")
    if loss not in LOSSES:
        raise ExportError(f"loss {loss!r} is unknown; use one of {', '.join(sorted(LOSSES))}, or a callable in Python")
    return LOSSES[loss]
