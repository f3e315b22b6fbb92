"""The functions that are traced: a training step with its update, evaluation, inference."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature, Hyper, Optimizer
from export.losses import Loss
from export.trace import Step

Tensors = dict[str, Tensor]
OPTIMIZERS = ("sgd", "momentum")


@dataclass(frozen=True)
class Problem:
    """A module with everything that makes it trainable: features, loss, optimizer, defaults of the hyperparameters."""

    module: nn.Module
    inputs: tuple[Feature, ...]
    targets: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    loss: Loss
    optimizer: Optimizer
    proximal: bool
    hypers: tuple[Hyper, ...]

    @property
    def trainable(self) -> Tensors:
        """Parameters that the step updates."""
        return {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}

    @property
    def frozen(self) -> Tensors:
        """Parameters that do not change, and buffers (which nothing may change)."""
        fixed = {n: p.detach() for n, p in self.module.named_parameters() if not p.requires_grad}
        saved = self.module.state_dict()
        return fixed | {n: b.detach() for n, b in self.module.named_buffers() if n in saved}

    def rows(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """What the mean loss of a batch divides by, float32 scalar."""
        return self.loss.count(*self.arguments(outputs, batch))

    def forward(self, weights: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensors:
        """The module's outputs by name."""
        inputs = tuple(batch[feature.name] for feature in self.inputs)
        result = torch.func.functional_call(self.module, dict(weights), inputs)
        tensors = (result,) if isinstance(result, Tensor) else tuple(result)
        return dict(zip((feature.name for feature in self.outputs), tensors, strict=True))

    def arguments(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[object, ...]:
        """What the loss and the metrics are called with: outputs (one tensor, or a tuple of several), then targets."""
        given = tuple(outputs.values())
        return (given[0] if len(given) == 1 else given, *(batch[feature.name] for feature in self.targets))


def choose_optimizer(
    name: str, *, lr: float, momentum: float, weight_decay: float, proximal: bool
) -> tuple[Optimizer, tuple[Hyper, ...]]:
    """The update rule with its state and hyperparameters.

    Raises:
        ExportError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        raise ExportError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    hypers = {"lr": lr, "weight_decay": weight_decay}
    if name == "momentum":
        hypers["momentum"] = momentum
    if proximal:
        hypers["mu"] = 0.0
    slots = ("momentum",) if name == "momentum" else ()
    return Optimizer(name, slots), tuple(Hyper(key, value) for key, value in hypers.items())


def train_step(problem: Problem) -> tuple[Step, Tensors]:
    """One step of training, and the tensors that it takes beside the batch, under the names of the bundle contract."""
    trainable, frozen = problem.trainable, problem.frozen
    slots = problem.optimizer.slots
    fixed = {f"param.{n}": t for n, t in (trainable | frozen).items()}
    fixed |= {f"slot.{s}.{n}": t for s in slots for n, t in trainable.items()}
    if problem.proximal:
        fixed |= {f"anchor.{n}": t for n, t in trainable.items()}
    fixed |= {f"hyper.{h.name}": torch.tensor(h.default, dtype=torch.float32) for h in problem.hypers}
    update = _momentum if slots else _sgd

    def step(tensors: Tensors) -> Tensors:
        leaves = {n: tensors[f"param.{n}"].detach().requires_grad_() for n in trainable}
        weights = leaves | {n: tensors[f"param.{n}"] for n in frozen}
        outputs = problem.forward(weights, tensors)
        given = problem.arguments(outputs, tensors)
        loss = problem.loss.traced(*given)
        if loss.dim() != 0:
            raise ExportError(f"loss {problem.loss.name!r} returns {list(loss.shape)}; return the scalar mean instead")
        # Plain SGD is linear in the gradient: a loss gradient that starts as lr makes lr * g without another pass.
        root = tensors["hyper.lr"] if update is _sgd else torch.ones_like(loss)
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, list(leaves.values()), grad_outputs=root, allow_unused=True
        )
        results = {"loss": loss.detach()}
        results |= {f"sum.{n}": t.detach() for n, t in problem.loss.metrics(*given).items()}
        results["sum.count"] = problem.rows(tensors, outputs)
        for name, grad in zip(trainable, grads, strict=True):
            results |= update(tensors, name, grad) if grad is not None else _unchanged(tensors, name, slots)
        return results

    return step, fixed


def _unchanged(tensors: Tensors, name: str, slots: tuple[str, ...]) -> Tensors:
    # As in PyTorch, a parameter that the loss does not reach does not decay either.
    kept = {f"next.{name}": tensors[f"param.{name}"]}
    return kept | {f"next.{slot}.{name}": tensors[f"slot.{slot}.{name}"] for slot in slots}


def _sgd(tensors: Tensors, name: str, step: Tensor) -> Tensors:
    weight, rate = tensors[f"param.{name}"], tensors["hyper.lr"]
    shrink = rate * tensors["hyper.weight_decay"]
    anchor = tensors.get(f"anchor.{name}")
    if anchor is None:
        return {f"next.{name}": weight * (1 - shrink) - step}
    pull = rate * tensors["hyper.mu"]
    return {f"next.{name}": weight * (1 - shrink - pull) + anchor * pull - step}


def _momentum(tensors: Tensors, name: str, grad: Tensor) -> Tensors:
    weight, slot = tensors[f"param.{name}"], tensors[f"slot.momentum.{name}"]
    moving = slot * tensors["hyper.momentum"] + weight * tensors["hyper.weight_decay"]
    anchor = tensors.get(f"anchor.{name}")
    if anchor is not None:
        moving = moving + (weight - anchor) * tensors["hyper.mu"]
    moving = moving + grad
    return {f"next.{name}": weight - moving * tensors["hyper.lr"], f"next.momentum.{name}": moving}


def eval_step(problem: Problem) -> tuple[Step, Tensors]:
    """Sums over a batch (loss, count, metrics), and the module's outputs, which make the inference graph."""
    fixed = {f"param.{n}": t for n, t in (problem.trainable | problem.frozen).items()}

    def step(tensors: Tensors) -> Tensors:
        outputs = problem.forward({n.removeprefix("param."): tensors[n] for n in fixed}, tensors)
        given, count = problem.arguments(outputs, tensors), problem.rows(tensors, outputs)
        sums = {"sum.loss": problem.loss.traced(*given) * count, "sum.count": count}
        return outputs | sums | {f"sum.{n}": t for n, t in problem.loss.metrics(*given).items()}

    return step, fixed
