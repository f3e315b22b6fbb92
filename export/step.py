"""The functions that are traced: a training step with its update, evaluation, inference."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature, Hyper, Optimizer
from export.dropout import DropoutMode
from export.losses import Loss
from export.trace import Step
from export.updates import STEP, UPDATES, Tensors, apply_updates, root

SEED = "seed"
"""Scalar int64 input: the same throughout a task, another in the next."""
SLICE = "slice"
"""Scalar int64: the number of a slice of the batch, from 0, where the batch is not passed through at once."""
TOTAL = "total:"
"""Prefix of what slices add up."""


@dataclass(frozen=True)
class Problem:
    """A module with everything that makes it trainable: features, loss, optimizer, defaults of the hyperparameters.

    ``chosen`` names the parameters that the step updates, ``changing`` the buffers that the forward pass does;
    ``micro_batch`` is how many rows pass forward and backward at once, None for the whole batch.
    """

    module: nn.Module
    inputs: tuple[Feature, ...]
    targets: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    loss: Loss
    optimizer: Optimizer
    proximal: bool
    control: bool
    hypers: tuple[Hyper, ...]
    chosen: frozenset[str]
    changing: frozenset[str]
    micro_batch: int | None = None

    @property
    def trainable(self) -> Tensors:
        """Parameters that the step updates; one with several names has the first."""
        return {n: p.detach() for n, p in self.module.named_parameters() if n in self.chosen}

    @property
    def buffers(self) -> Tensors:
        """Buffers that the forward pass changes in training."""
        return {n: b.detach() for n, b in self.module.named_buffers() if n in self.changing}

    @property
    def frozen(self) -> Tensors:
        """Parameters and buffers that nothing changes."""
        fixed = {n: p.detach() for n, p in self.module.named_parameters() if n not in self.chosen}
        saved = self.module.state_dict()
        kept = {n: b.detach() for n, b in self.module.named_buffers() if n in saved and n not in self.changing}
        return fixed | kept

    @property
    def state(self) -> Tensors:
        """All of them."""
        return self.trainable | self.buffers | self.frozen

    def rows(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """What the mean loss of a batch divides by, float32 scalar."""
        return self.loss.count(*self.arguments(outputs, batch))

    def forward(self, state: Tensors, batch: Mapping[str, Tensor]) -> Tensors:
        """The module's outputs by name; buffers that it changes are changed in ``state``."""
        inputs = tuple(batch[feature.name] for feature in self.inputs)
        result = torch.func.functional_call(self.module, state, inputs)
        tensors = (result,) if isinstance(result, Tensor) else tuple(result)
        return dict(zip((feature.name for feature in self.outputs), tensors, strict=True))

    def arguments(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[object, ...]:
        """What the loss and the metrics are called with: outputs (one tensor, or a tuple of several), then targets."""
        given = tuple(outputs.values())
        return (given[0] if len(given) == 1 else given, *(batch[feature.name] for feature in self.targets))


def train_step(problem: Problem) -> tuple[Step, Tensors]:
    """One step of training, and the tensors that it takes beside the batch, under the names of the bundle contract.

    `STEP` and `SEED` are among them whether or not the step uses them.
    """
    fixed = {f"param.{n}": t for n, t in problem.state.items()} | _state_of_updates(problem)
    fixed |= {STEP: torch.tensor(1), SEED: torch.tensor(0)}

    def step(tensors: Tensors) -> Tensors:
        passed = _pass(problem, tensors, tensors[STEP])
        begin = root(tensors, passed.loss, problem.optimizer)
        grads = passed.gradients(begin)
        results = {"loss": passed.loss.detach()} | passed.sums | passed.buffers
        return results | apply_updates(tensors, grads, problem.optimizer)

    return step, fixed


def slice_step(problem: Problem) -> tuple[Step, Tensors]:
    """Forward and backward pass of a slice of the batch: adds to the sums ``total:*``, gradients included.

    Takes `SLICE` beside what a step does, less what belongs to updates. Parameters that the loss does not reach have
    no sum of gradients among the results.
    """
    fixed = {f"param.{n}": t for n, t in problem.state.items()}
    fixed |= {f"{TOTAL}{n}": torch.zeros(()) for n in ("loss", "count", *problem.loss.names)}
    fixed |= {f"{TOTAL}grad.{n}": torch.zeros_like(t) for n, t in problem.trainable.items()}
    fixed |= {STEP: torch.tensor(1), SEED: torch.tensor(0), SLICE: torch.tensor(0)}

    def step(tensors: Tensors) -> Tensors:
        passed = _pass(problem, tensors, slice_number(tensors[STEP], tensors[SLICE]))
        count = passed.sums.pop("sum.count")
        # A mean times what it divides by is a sum, which adds up; the slices' gradients are those of sums too.
        grads = passed.gradients(count.to(passed.loss.dtype))
        sums = {"loss": passed.loss.detach() * count, "count": count}
        sums |= {name.removeprefix("sum."): value for name, value in passed.sums.items()}
        sums |= {f"grad.{n}": grad for n, grad in grads.items() if grad is not None}
        return passed.buffers | {f"next.{TOTAL}{n}": tensors[f"{TOTAL}{n}"] + value for n, value in sums.items()}

    return step, fixed


def update_step(problem: Problem, reached: Collection[str]) -> tuple[Step, Tensors]:
    """The update from the sums of `slice_step`, with gradients of the parameters that are ``reached``."""
    fixed = {f"param.{n}": t for n, t in problem.trainable.items()} | _state_of_updates(problem)
    fixed |= {f"{TOTAL}{n}": torch.zeros(()) for n in ("loss", "count", *problem.loss.names)}
    fixed |= {f"{TOTAL}grad.{n}": torch.zeros_like(t) for n, t in problem.trainable.items() if n in reached}
    fixed |= {STEP: torch.tensor(1)}

    def step(tensors: Tensors) -> Tensors:
        count = tensors[f"{TOTAL}count"]
        share = 1 / torch.where(count > 0, count, 1.0)
        scale = root(tensors, count, problem.optimizer) * share
        grads = {n: tensors[f"{TOTAL}grad.{n}"] * scale if n in reached else None for n in problem.trainable}
        results = {"loss": tensors[f"{TOTAL}loss"] * share}
        results |= {f"sum.{n}": tensors[f"{TOTAL}{n}"] for n in (*problem.loss.names, "count")}
        return results | apply_updates(tensors, grads, problem.optimizer)

    return step, fixed


def slice_number(step: Tensor, part: Tensor) -> Tensor:
    """What stands for the step number in the masks of dropout, which differ from slice to slice."""
    return step + part * 2**40


@dataclass(frozen=True)
class _Pass:
    """A forward pass: loss, sums, buffers after it, and the leaves that gradients are taken of."""

    loss: Tensor
    sums: Tensors
    buffers: Tensors
    leaves: Tensors

    def gradients(self, begin: Tensor) -> dict[str, Tensor | None]:
        """Of ``begin`` times the loss; None for what it does not reach."""
        leaves = list(self.leaves.values())
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(self.loss, leaves, grad_outputs=begin, allow_unused=True)
        return dict(zip(self.leaves, grads, strict=True))


def _pass(problem: Problem, tensors: Tensors, number: Tensor) -> _Pass:
    leaves = {n: tensors[f"param.{n}"].detach().requires_grad_() for n in problem.trainable}
    # Copies, because the forward pass writes into them.
    state = leaves | {n: tensors[f"param.{n}"].clone() for n in problem.buffers}
    state |= {n: tensors[f"param.{n}"] for n in problem.frozen}
    with DropoutMode(tensors[SEED], number):
        outputs = problem.forward(state, tensors)
        given = problem.arguments(outputs, tensors)
        loss = problem.loss.traced(*given)
    if loss.dim() != 0:
        raise ExportError(f"loss {problem.loss.name!r} returns {list(loss.shape)}; return the scalar mean instead")
    sums = {f"sum.{n}": t.detach() for n, t in problem.loss.metrics(*given).items()}
    sums["sum.count"] = problem.rows(tensors, outputs).detach()
    return _Pass(loss, sums, {f"next.{n}": state[n].detach() for n in problem.buffers}, leaves)


def _state_of_updates(problem: Problem) -> Tensors:
    trainable = problem.trainable
    fixed = {f"slot.{s}.{n}": t for s in UPDATES[problem.optimizer.name].slots for n, t in trainable.items()}
    for kind in ["anchor"] * problem.proximal + ["control"] * problem.control:
        fixed |= {f"{kind}.{n}": t for n, t in trainable.items()}
    return fixed | {f"hyper.{h.name}": torch.tensor(h.default, dtype=torch.float32) for h in problem.hypers}


def eval_step(problem: Problem) -> tuple[Step, Tensors]:
    """Sums over a batch (loss, count, metrics), and the module's outputs, which make the inference graph."""
    fixed = {f"param.{n}": t for n, t in problem.state.items()}

    def step(tensors: Tensors) -> Tensors:
        outputs = problem.forward({n.removeprefix("param."): tensors[n] for n in fixed}, tensors)
        given, count = problem.arguments(outputs, tensors), problem.rows(tensors, outputs)
        sums = {"sum.loss": problem.loss.traced(*given) * count, "sum.count": count}
        return outputs | sums | {f"sum.{n}": t for n, t in problem.loss.metrics(*given).items()}

    return step, fixed
