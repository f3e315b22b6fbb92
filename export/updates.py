"""Optimizers in the graph: SGD, momentum, Nesterov, Adam and AdamW as `torch.optim` has them.

A pass over a large tensor costs as much as a matrix product of it, so constants are folded into scalars, and state is
kept in units that save passes:

- Without clipping, updates of the SGD family are linear in the gradient: backpropagation starts with the learning rate
  instead of one and hands over ``lr * g``, which a matrix product adds up in place.
- ``momentum`` is kept times the learning rate (Sutskever et al. 2013): ``v' = m v + lr g``, ``w' = w - v'``.
- Adam's moments are kept as plain decaying sums, ``first / (1 - beta1)`` and ``second / (1 - beta2)`` of the paper
  (Kingma & Ba 2015, arXiv 1412.6980); AdamW decouples the decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

Of the hyperparameters only ``lr`` may be another one in each step, ``lr_t``. Plain SGD, Adam and AdamW then are what
`torch.optim` makes of it. With momentum each gradient goes on at the rate of its own step, as Sutskever et al. have it:
``v' = m v + lr_t g``. PyTorch's ``w' = w - lr_t v'`` with ``v' = m v + g`` moves all gradients so far at the present
rate, and is the same as long as the rate does not change; while it falls, its steps are shorter than those here.

The gradient is that of the local objective: with the proximal term ``mu (w - anchor)`` and the control variate, where
asked for, added before it is clipped; weight decay comes after, as in PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_client.errors import ExportError
from edge_client.manifest import Hyper, Optimizer

Tensors = dict[str, Tensor]

STEP = "step"
"""Scalar int64 input: 1 for the first step of a task, then one more each."""
MAX_NORM = "max_norm"


@dataclass(frozen=True)
class Shared:
    """What the updates of all tensors have in common, each a 0-d tensor: a pass over scalars costs nothing."""

    hypers: Tensors
    factor: Tensor | None
    """What gradients are yet to be multiplied by; None where they came out of backpropagation right."""
    values: Tensors = field(default_factory=dict)

    def decay(self, *names: str) -> Tensor:
        """``lr`` times the sum of the hyperparameters of these names that there are."""
        pulls = [self.hypers[name] for name in names if name in self.hypers]
        total = pulls[0]
        for pull in pulls[1:]:
            total = total + pull
        return self.hypers["lr"] * total


@dataclass(frozen=True)
class Gradient:
    """One tensor's gradient, and what joins it."""

    weight: Tensor
    grad: Tensor
    anchor: Tensor | None
    control: Tensor | None

    def joined(self, mu: Tensor | None) -> Tensor:
        """The gradient of the local objective: with the proximal term and the control variate."""
        total = self.grad
        if self.anchor is not None and mu is not None:
            total = total + (self.weight - self.anchor) * mu
        return total if self.control is None else total + self.control


Rule = Callable[[Gradient, Tensors, Shared], tuple[Tensor, Tensors]]
"""``rule(gradient, slots, shared)``: the next weight and the next slots."""


@dataclass(frozen=True)
class UpdateRule:
    """An optimizer: its hyperparameters beside ``lr`` and ``weight_decay``, its slots, and how it updates one tensor.

    ``linear``: the update is linear in the gradient, so that gradients may arrive as ``lr * g``. ``prepare`` computes
    scalars for all tensors from the hyperparameters and the step number.
    """

    hypers: tuple[str, ...]
    slots: tuple[str, ...]
    linear: bool
    rule: Rule
    prepare: Callable[[Tensors, Tensor | None], Tensors] = lambda hypers, step: {}
    counts: bool = False


def clipping(grads: list[Tensor], max_norm: Tensor) -> Tensor:
    """The factor of `torch.nn.utils.clip_grad_norm_`: at most one; one where ``max_norm`` is zero, that is, off."""
    # Columns first: onnxruntime adds a whole tensor up in one float32, 1e-3 off for 16 million elements.
    squares = [(grad * grad).sum(0).sum() if grad.dim() > 1 else (grad * grad).sum() for grad in grads]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    factor = torch.clamp(max_norm / (torch.sqrt(total) + 1e-6), max=1.0)
    return torch.where(max_norm > 0, factor, torch.ones_like(factor))


def _pulled(g: Gradient, s: Shared) -> tuple[Tensor, Tensor | None]:
    """For gradients that arrive as ``lr * g``: the scalar that pulls towards zero, and what else joins the step."""
    if g.anchor is None:
        shrink, extra = s.decay("weight_decay"), None
    else:
        shrink, extra = s.decay("weight_decay", "mu"), g.anchor * -s.decay("mu")
    if g.control is not None:
        push = g.control * s.hypers["lr"]
        extra = push if extra is None else extra + push
    return shrink, extra


def _sgd(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    if s.factor is None:
        shrink, extra = _pulled(g, s)
        kept = g.weight * (1 - shrink)
        return (kept if extra is None else kept - extra) - g.grad, {}
    kept = g.weight * (1 - s.decay("weight_decay"))
    return kept - g.joined(s.hypers.get("mu")) * s.factor, {}


def _velocity(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensor]:
    """``m v`` and ``m v + lr g``, with all that joins the gradient."""
    kept = slots["momentum"] * s.hypers["momentum"]
    if s.factor is None:
        shrink, extra = _pulled(g, s)
        moving = kept + g.weight * shrink
        return kept, (moving if extra is None else moving + extra) + g.grad
    moving = kept + g.weight * s.decay("weight_decay")
    return kept, moving + g.joined(s.hypers.get("mu")) * s.factor


def _momentum(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    _, velocity = _velocity(g, slots, s)
    return g.weight - velocity, {"momentum": velocity}


def _nesterov(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    # w - (lr g + m v') where lr g = v' - m v: the gradient itself need not be there once more.
    kept, velocity = _velocity(g, slots, s)
    return (g.weight + kept) - velocity * (1 + s.hypers["momentum"]), {"momentum": velocity}


def _corrections(hypers: Tensors, step: Tensor | None) -> Tensors:
    """Step size and epsilon for moments kept as sums, in float64: 1 - beta2^t loses four digits in float32."""
    assert step is not None
    one, count = {n: 1 - hypers[n].to(torch.float64) for n in ("beta1", "beta2")}, step.to(torch.float64)
    first = one["beta1"] / (1 - hypers["beta1"].to(torch.float64) ** count)
    second = torch.sqrt(one["beta2"] / (1 - hypers["beta2"].to(torch.float64) ** count))
    return {
        "size": (hypers["lr"].to(torch.float64) * first / second).to(torch.float32),
        "eps": (hypers["eps"].to(torch.float64) / second).to(torch.float32),
    }


def _adam(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    grad = _whole(g, s) + g.weight * s.hypers["weight_decay"]
    change, slots = _moments(grad, slots, s)
    return g.weight - change, slots


def _adamw(g: Gradient, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    change, slots = _moments(_whole(g, s), slots, s)
    return g.weight * (1 - s.decay("weight_decay")) - change, slots


def _whole(g: Gradient, s: Shared) -> Tensor:
    joined = g.joined(s.hypers.get("mu"))
    return joined if s.factor is None else joined * s.factor


def _moments(grad: Tensor, slots: Tensors, s: Shared) -> tuple[Tensor, Tensors]:
    first = slots["first_moment"] * s.hypers["beta1"] + grad
    second = slots["second_moment"] * s.hypers["beta2"] + grad * grad
    change = first * s.values["size"] / (torch.sqrt(second) + s.values["eps"])
    return change, {"first_moment": first, "second_moment": second}


_BETAS = ("beta1", "beta2", "eps")
_MOMENTS = ("first_moment", "second_moment")
UPDATES: Mapping[str, UpdateRule] = {
    "sgd": UpdateRule((), (), True, _sgd),
    "momentum": UpdateRule(("momentum",), ("momentum",), True, _momentum),
    "nesterov": UpdateRule(("momentum",), ("momentum",), True, _nesterov),
    "adam": UpdateRule(_BETAS, _MOMENTS, False, _adam, _corrections, True),
    "adamw": UpdateRule(_BETAS, _MOMENTS, False, _adamw, _corrections, True),
}


def choose_optimizer(
    name: str, values: Mapping[str, float], *, proximal: bool, clip: float | None
) -> tuple[Optimizer, tuple[Hyper, ...]]:
    """The update rule with its state and hyperparameters; ``values`` holds defaults of at least those it has.

    Raises:
        ExportError: no optimizer has that name.
    """
    if name not in UPDATES:
        raise ExportError(f"optimizer {name!r} is unknown; use one of {', '.join(UPDATES)}")
    hypers = {key: values[key] for key in ("lr", "weight_decay", *UPDATES[name].hypers)}
    if clip is not None:
        hypers[MAX_NORM] = clip
    if proximal:
        hypers["mu"] = 0.0
    return Optimizer(name, UPDATES[name].slots), tuple(Hyper(key, value) for key, value in hypers.items())


def apply_updates(tensors: Tensors, grads: Mapping[str, Tensor | None], optimizer: Optimizer) -> Tensors:
    """All results named ``next.*``, from gradients that began as `root` says.

    As in PyTorch, a parameter that the loss does not reach (gradient None) does not decay either.
    """
    update = UPDATES[optimizer.name]
    hypers = {name.removeprefix("hyper."): t for name, t in tensors.items() if name.startswith("hyper.")}
    moving: dict[str, Gradient] = {}
    results: Tensors = {}
    for name, grad in grads.items():
        weight = tensors[f"param.{name}"]
        if grad is None:
            results[f"next.{name}"] = weight
            results |= {f"next.{slot}.{name}": tensors[f"slot.{slot}.{name}"] for slot in update.slots}
        else:
            moving[name] = Gradient(weight, grad, tensors.get(f"anchor.{name}"), tensors.get(f"control.{name}"))
    factor = None
    if MAX_NORM in hypers and moving:
        # Joined once: the norm and the update read the same values.
        moving = {n: Gradient(g.weight, g.joined(hypers.get("mu")), None, None) for n, g in moving.items()}
        factor = clipping([g.grad for g in moving.values()], hypers[MAX_NORM])
        factor = factor * hypers["lr"] if update.linear else factor
    shared = Shared(hypers, factor, update.prepare(hypers, tensors.get(STEP)))
    for name, gradient in moving.items():
        slots = {slot: tensors[f"slot.{slot}.{name}"] for slot in update.slots}
        results[f"next.{name}"], after = update.rule(gradient, slots, shared)
        results |= {f"next.{slot}.{name}": tensor for slot, tensor in after.items()}
    return results


def root(tensors: Tensors, loss: Tensor, optimizer: Optimizer) -> Tensor:
    """The gradient of the loss to begin with: the learning rate, where the update is linear and nothing is clipped."""
    if UPDATES[optimizer.name].linear and f"hyper.{MAX_NORM}" not in tensors:
        return tensors["hyper.lr"]
    return torch.ones_like(loss)
