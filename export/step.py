"""The functions that are traced: a training step with its update, evaluation, inference."""

from collections.abc import Mapping
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


@dataclass(frozen=True)
class Problem:
    """A module with everything that makes it trainable: features, loss, optimizer, defaults of the hyperparameters.

    ``chosen`` names the parameters that the step updates, ``changing`` the buffers that the forward pass does.
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
    trainable, buffers, frozen = problem.trainable, problem.buffers, problem.frozen
    fixed = {f"param.{n}": t for n, t in problem.state.items()}
    fixed |= {f"slot.{s}.{n}": t for s in UPDATES[problem.optimizer.name].slots for n, t in trainable.items()}
    for kind in ["anchor"] * problem.proximal + ["control"] * problem.control:
        fixed |= {f"{kind}.{n}": t for n, t in trainable.items()}
    fixed |= {f"hyper.{h.name}": torch.tensor(h.default, dtype=torch.float32) for h in problem.hypers}
    fixed |= {STEP: torch.tensor(1), SEED: torch.tensor(0)}

    def step(tensors: Tensors) -> Tensors:
        leaves = {n: tensors[f"param.{n}"].detach().requires_grad_() for n in trainable}
        # Copies, because the forward pass writes into them.
        state = leaves | {n: tensors[f"param.{n}"].clone() for n in buffers}
        state |= {n: tensors[f"param.{n}"] for n in frozen}
        with DropoutMode(tensors[SEED], tensors[STEP]):
            outputs = problem.forward(state, tensors)
            given = problem.arguments(outputs, tensors)
            loss = problem.loss.traced(*given)
        if loss.dim() != 0:
            raise ExportError(f"loss {problem.loss.name!r} returns {list(loss.shape)}; return the scalar mean instead")
        begin = root(tensors, loss, problem.optimizer)
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, list(leaves.values()), grad_outputs=begin, allow_unused=True
        )
        results = {"loss": loss.detach()}
        results |= {f"sum.{n}": t.detach() for n, t in problem.loss.metrics(*given).items()}
        results["sum.count"] = problem.rows(tensors, outputs)
        results |= {f"next.{n}": state[n].detach() for n in buffers}
        return results | apply_updates(tensors, dict(zip(trainable, grads, strict=True)), problem.optimizer)

    return step, fixed


def eval_step(problem: Problem) -> tuple[Step, Tensors]:
    """Sums over a batch (loss, count, metrics), and the module's outputs, which make the inference graph."""
    fixed = {f"param.{n}": t for n, t in problem.state.items()}

    def step(tensors: Tensors) -> Tensors:
        outputs = problem.forward({n.removeprefix("param."): tensors[n] for n in fixed}, tensors)
        given, count = problem.arguments(outputs, tensors), problem.rows(tensors, outputs)
        sums = {"sum.loss": problem.loss.traced(*given) * count, "sum.count": count}
        return outputs | sums | {f"sum.{n}": t for n, t in problem.loss.metrics(*given).items()}

    return step, fixed
