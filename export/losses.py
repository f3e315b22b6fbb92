"""Losses by name, with the sums that evaluation reports and the targets they take.

They mean what `torch.nn.functional` means by them with ``reduction="mean"``, options included, but for one thing: a
batch whose targets are all ignored has loss 0 and gradient 0, where PyTorch has NaN, which one such batch on a device
would leave in the model for good. A class outside ``0 .. C - 1``, which PyTorch refuses, is ignored as well: a graph
has no way to fail.

``count`` is what the mean divides by, so that ``loss * count`` of several batches adds up exactly: the targets that are
not ignored, each weighing as its class does. ``correct`` is counted by the same weights, and accuracy is its share.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_client.errors import ExportError
from edge_client.manifest import Feature

LossFunction = Callable[..., Tensor]
Counts = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Loss:
    """A mean loss, how it is written for tracing, how PyTorch writes it, and what is counted beside it.

    ``traced``, ``reference`` and ``count`` take ``(outputs, *targets)`` and return a scalar; ``metrics`` returns sums.
    """

    name: str
    traced: LossFunction
    reference: LossFunction
    count: LossFunction
    metrics: Counts
    names: tuple[str, ...]
    target_dtype: str | None
    output_name: str

    def targets(self, outputs: tuple[int, ...]) -> tuple[Feature, ...]:
        """The target that goes with outputs of the given shape (without the batch dimension)."""
        if self.target_dtype == "int64":
            return (Feature("y", outputs[:-1], "int64"),)
        return (Feature("y", outputs, "float32"),)


@dataclass(frozen=True)
class _Rows:
    """Of every target: 1 or, where it is ignored, 0; a class that exists; what it weighs. And the sum of weights."""

    valid: Tensor
    places: Tensor
    shares: Tensor
    count: Tensor

    @property
    def divisor(self) -> Tensor:
        return torch.where(self.count > 0, self.count, 1.0)

    def pick(self, scores: Tensor) -> Tensor:
        return scores.gather(-1, self.places.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class _Classes:
    """Losses over classes: logits or log-probabilities ``[N, ..., C]``, targets ``[N, ...] int64``."""

    weight: Tensor | None
    ignored: int
    smoothing: float = 0.0

    def rows(self, scores: Tensor, targets: Tensor) -> _Rows:
        classes = scores.shape[-1]
        if self.weight is not None and len(self.weight) != classes:
            raise ExportError(f"loss weight has {len(self.weight)} numbers for {classes} classes; give one for each")
        kept = (targets >= 0) & (targets < classes)
        if 0 <= self.ignored < classes:
            kept = kept & (targets != self.ignored)
        places, valid = torch.where(kept, targets, 0), kept.to(scores.dtype)
        shares = valid if self.weight is None else valid * self.weight[places]
        return _Rows(valid, places, shares, shares.sum())

    def count(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self.rows(scores, targets).count

    def correct(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
        hits = (scores.argmax(-1) == targets).to(scores.dtype)
        return {"correct": (hits * self.rows(scores, targets).shares).sum()}

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = _CrossEntropy.apply(self, logits, targets)  # type: ignore[no-untyped-call]
        return result

    def cross_entropy_reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not bool(self.count(logits, targets) > 0):
            return (logits * 0).sum()
        flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        options = {"ignore_index": self.ignored, "label_smoothing": self.smoothing}
        return F.cross_entropy(flat, wanted, self.weight, **options)  # type: ignore[arg-type]

    def nll(self, log_p: Tensor, targets: Tensor) -> Tensor:
        rows = self.rows(log_p, targets)
        return -(rows.pick(log_p) * rows.shares).sum() / rows.divisor

    def nll_reference(self, log_p: Tensor, targets: Tensor) -> Tensor:
        if not bool(self.count(log_p, targets) > 0):
            return (log_p * 0).sum()
        flat, wanted = log_p.reshape(-1, log_p.shape[-1]), targets.reshape(-1)
        return F.nll_loss(flat, wanted, self.weight, ignore_index=self.ignored)


class _CrossEntropy(torch.autograd.Function):
    # softmax - target in two passes: autograd's way through log_softmax costs five more over the logits.
    @staticmethod
    def forward(ctx: Any, of: _Classes, logits: Tensor, targets: Tensor) -> Tensor:
        log_p, rows = torch.log_softmax(logits, -1), of.rows(logits, targets)
        divisor = rows.divisor
        ctx.of = of
        ctx.save_for_backward(log_p, rows.valid, rows.places, rows.shares, divisor)
        total = (rows.pick(log_p) * rows.shares).sum() * (of.smoothing - 1)
        if of.smoothing:
            every = log_p if of.weight is None else log_p * of.weight
            total = total - (every.sum(-1) * rows.valid).sum() * (of.smoothing / logits.shape[-1])
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        log_p, valid, places, shares, divisor = ctx.saved_tensors
        smoothing, weight, classes = ctx.of.smoothing, ctx.of.weight, log_p.shape[-1]
        step = grads[0] / divisor
        hard, whole = shares * (step * (1 - smoothing)), shares * step
        if smoothing:
            soft = valid * (step * (smoothing / classes))
            whole = hard + soft * (classes if weight is None else weight.sum())
        slope = torch.exp(log_p) * whole.unsqueeze(-1)
        if smoothing:
            every = soft.unsqueeze(-1)
            slope = slope - (every if weight is None else every * weight)
        return None, slope.scatter_add(-1, places.unsqueeze(-1), -hard.unsqueeze(-1)), None


@dataclass(frozen=True)
class _Bits:
    """Binary cross-entropy of logits: ``positive`` is how much a target of 1 weighs."""

    positive: Tensor | None

    def traced(self, logits: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = _BinaryCrossEntropy.apply(self, logits, targets)  # type: ignore[no-untyped-call]
        return result

    def reference(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.positive)


class _BinaryCrossEntropy(torch.autograd.Function):
    # sigmoid - target: autograd's way takes several more passes.
    @staticmethod
    def forward(ctx: Any, of: _Bits, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.of = of
        ctx.save_for_backward(logits, targets)
        if of.positive is None:
            return (F.softplus(logits) - logits * targets).mean()
        weights = 1 + (of.positive - 1) * targets
        return (F.softplus(-logits) * weights + logits * (1 - targets)).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        logits, targets = ctx.saved_tensors
        slope, weight = torch.sigmoid(logits), ctx.of.positive
        slope = slope - targets if weight is None else slope * (1 + (weight - 1) * targets) - weight * targets
        return None, slope * (grads[0] / logits.numel()), None


def _elements(_: Tensor, targets: Tensor) -> Tensor:
    return torch.ones(()) * targets.numel()


def _first_rows(outputs: Tensor | tuple[Tensor, ...], *_: Tensor) -> Tensor:
    return torch.ones(()) * (outputs if isinstance(outputs, Tensor) else outputs[0]).shape[0]


def _correct_bits(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"correct": ((logits > 0) == (targets > 0.5)).to(torch.float32).sum()}


def _errors(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    difference = outputs - targets
    return {"squared_error": (difference * difference).sum(), "absolute_error": difference.abs().sum()}


def _tensor(name: str, value: object) -> Tensor | None:
    if value is None:
        return None
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().clone()
    except (TypeError, ValueError) as error:
        raise ExportError(f"loss option {name} is {value!r}; expected numbers") from error
    if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()) or not bool((tensor > 0).any()):
        raise ExportError(f"loss option {name} is {value!r}; expected finite numbers of at least 0, one above 0")
    return tensor


def _range(low: float) -> str:
    return "above 0" if 0 < low < 1e-30 else f"of at least {low:g}"


def _real(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, int | float) or not (low <= value <= high) or not math.isfinite(value):
        raise ExportError(f"loss option {name} is {value!r}; expected a finite number {_range(low)}")
    return float(value)


def _class_loss(name: str, given: Mapping[str, Any]) -> Loss:
    ignored = given.get("ignore_index", -100)
    if isinstance(ignored, bool) or not isinstance(ignored, int):
        raise ExportError(f"loss option ignore_index is {ignored!r}; expected an integer")
    of = _Classes(
        _tensor("weight", given.get("weight")), ignored, _real("label_smoothing", given.get("label_smoothing", 0), 0, 1)
    )
    if of.weight is not None and of.weight.dim() != 1:
        raise ExportError("loss option weight has one number for each class")
    if name == "nll":
        return Loss(name, of.nll, of.nll_reference, of.count, of.correct, ("correct",), "int64", "log_probabilities")
    traced, reference = of.cross_entropy, of.cross_entropy_reference
    return Loss(name, traced, reference, of.count, of.correct, ("correct",), "int64", "logits")


def _bit_loss(name: str, given: Mapping[str, Any]) -> Loss:
    of = _Bits(_tensor("pos_weight", given.get("pos_weight")))
    return Loss(name, of.traced, of.reference, _elements, _correct_bits, ("correct",), "float32", "logits")


def _regression(name: str, given: Mapping[str, Any]) -> Loss:
    function = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss, "smooth_l1": F.smooth_l1_loss}[name]
    least = {"delta": math.ulp(0.0), "beta": 0.0}
    options = {key: _real(key, value, least[key], math.inf) for key, value in given.items()}

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = function(outputs, targets, **options)  # type: ignore[operator]
        return found

    return Loss(name, mean, mean, _elements, _errors, ("squared_error", "absolute_error"), "float32", "output")


LOSSES: dict[str, tuple[Callable[[str, Mapping[str, Any]], Loss], tuple[str, ...]]] = {
    "cross_entropy": (_class_loss, ("weight", "ignore_index", "label_smoothing")),
    "nll": (_class_loss, ("weight", "ignore_index")),
    "bce_with_logits": (_bit_loss, ("pos_weight",)),
    "mse": (_regression, ()),
    "l1": (_regression, ()),
    "huber": (_regression, ("delta",)),
    "smooth_l1": (_regression, ("beta",)),
}
"""Losses by name: how each is made, and the options it takes, named as in `torch.nn.functional`."""


def resolve_loss(loss: str | LossFunction, **options: object) -> Loss:
    """A loss by its name with the options of `torch.nn.functional`, or any callable ``(outputs, *targets) -> mean``.

    Raises:
        ExportError: no loss has that name, or it does not take such an option.
    """
    if callable(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        if options:
            raise ExportError(f"loss {name!r} is a callable, which takes no options; bind them with functools.partial")
        return Loss(name, loss, loss, _first_rows, lambda *_: {}, (), None, "output")
    if loss not in LOSSES:
        raise ExportError(f"loss {loss!r} is unknown; use one of {', '.join(sorted(LOSSES))}, or a callable in Python")
    make, known = LOSSES[loss]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ExportError(f"loss {loss!r} takes no option {unknown[0]!r}; it takes {', '.join(known) or 'none'}")
    return make(loss, options)


def parse_options(texts: Sequence[str]) -> dict[str, object]:
    """``["label_smoothing=0.1", "weight=1,2,0.5"]`` as options of a loss.

    Raises:
        ExportError: one of them is not of the form key=number or key=number,number,...
    """
    options: dict[str, object] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            numbers = [int(part) if part.strip().lstrip("-").isdigit() else float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not key or not equals or not numbers:
            raise ExportError(f"loss option {text!r} is not of the form key=number or key=number,number,...")
        options[key.strip()] = numbers[0] if len(numbers) == 1 and key.strip() != "weight" else numbers
    return options
