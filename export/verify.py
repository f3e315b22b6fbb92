"""Parity with PyTorch, checked at every export.

Three steps from the initial weights at several batch sizes and kinds of input. Each tensor is compared twice: its
value, relative to its largest magnitude, and what the steps changed, relative to the largest change. A change of less
than 1 % of the tensor's magnitude is taken as 1 %: below that, float32 rounding of the weights themselves comes into
reach of the tolerance, while a wrong gradient (an error as large as the change) is caught down to a millionth of the
weights.

Max-pooling and ReLU have gradients that jump: where two values of a window differ by less than rounding, each library
may rightly see another maximum. Among 100,000 windows that happens, so a disagreement counts when it repeats with fresh
data.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_client import runtime
from edge_client.errors import ExportError
from edge_client.manifest import Feature, Parity
from export.step import Problem

TOLERANCE = 1e-4
BATCHES = (1, 7, 32)
STEPS = 3
ATTEMPTS = 3
LEAST_CHANGE = 1e-2
KINDS = ("random", "zero", "constant", "rounded")

Arrays = dict[str, npt.NDArray[np.generic]]
Run = Callable[[Mapping[str, npt.NDArray[np.generic]]], Arrays]


@dataclass(frozen=True)
class Graphs:
    """The three serialized graphs of a bundle."""

    train: bytes
    eval: bytes
    infer: bytes


@dataclass
class _Worst:
    error: float = 0.0
    what: str = ""

    def see(self, error: float, what: str) -> None:
        if not error <= self.error:  # NaN counts as worst
            self.error, self.what = error, what


def verify(problem: Problem, graphs: Graphs, *, seed: int = 0) -> Parity:
    """Compare the graphs with PyTorch's own autograd, optimizer and losses.

    Raises:
        ExportError: they disagree by more than `TOLERANCE`; the message names the tensor and the case.
    """
    train, evaluate, infer = (_runner(g) for g in (graphs.train, graphs.eval, graphs.infer))
    generator = np.random.default_rng(seed)
    worst, cases = _Worst(), 0
    limit = _largest_index(problem.module)
    modes = {name: module.training for name, module in problem.module.named_modules()}
    try:
        for batch, kind in itertools.product(BATCHES, KINDS):
            case = f"{kind} inputs, batch {batch}"
            for _ in range(ATTEMPTS):
                found = _Worst()
                data = _batch(problem, batch, kind, limit, generator)
                _compare_training(problem, train, data, _settings(problem, cases), case, found)
                _compare_evaluation(problem, evaluate, infer, data, case, found)
                if found.error <= TOLERANCE:
                    break
            worst.see(found.error, found.what)
            cases += 1
    finally:
        for name, module in problem.module.named_modules():
            module.training = modes[name]
    if not worst.error <= TOLERANCE:
        raise ExportError(
            f"the training graph disagrees with PyTorch: {worst.what} is off by {worst.error:.1e} relative, "
            f"allowed is {TOLERANCE:.0e}; nothing was written. Report the model, or replace the layer"
        )
    return Parity(float(worst.error), TOLERANCE, cases, str(torch.__version__), runtime.VERSION)


def _runner(model: bytes) -> Run:
    session = runtime.session(model)
    wanted = [i.name for i in session.get_inputs()]
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))

    return run


def _settings(problem: Problem, case: int) -> dict[str, float]:
    # Both sides of every hyperparameter that switches something off at zero.
    chosen = {"lr": 0.05, "momentum": 0.9, "weight_decay": (0.0, 0.02)[case % 2], "mu": (0.1, 0.0, 0.1)[case % 3]}
    return {hyper.name: chosen[hyper.name] for hyper in problem.hypers}


def _largest_index(module: nn.Module) -> int:
    return min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=2)


def _batch(problem: Problem, size: int, kind: str, limit: int, generator: np.random.Generator) -> Arrays:
    def integers(shape: tuple[int, ...], high: int) -> npt.NDArray[np.generic]:
        top = {"random": high, "zero": 1, "constant": high, "rounded": min(high, 3)}[kind]
        values = generator.integers(0, top, shape)
        return np.full(shape, high // 2) if kind == "constant" else values

    def floats(shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        if kind in ("zero", "constant"):
            return np.full(shape, 0.0 if kind == "zero" else generator.uniform(0.5, 1), np.float32)
        values = generator.standard_normal(shape)
        return (np.round(values) / 2 if kind == "rounded" else values).astype(np.float32)

    batch = {}
    for feature in problem.inputs:
        shape = (size, *feature.shape)
        batch[feature.name] = floats(shape) if feature.dtype == "float32" else integers(shape, limit)
    for feature in problem.targets:
        shape = (size, *feature.shape)
        if feature.dtype == "int64":
            batch[feature.name] = generator.integers(0, _classes(problem, feature), shape)
        else:
            batch[feature.name] = generator.integers(0, 2, shape).astype(np.float32)
    return batch


def _classes(problem: Problem, target: Feature) -> int:
    shape = problem.outputs[0].shape
    return shape[-1] if len(shape) == len(target.shape) + 1 else 2


def _compare_training(
    problem: Problem, train: Run, data: Arrays, hypers: Mapping[str, float], case: str, worst: _Worst
) -> None:
    weights = {n: t.clone() for n, t in problem.trainable.items()}
    fixed = {f"param.{n}": t.numpy() for n, t in problem.frozen.items()}
    fixed |= {f"hyper.{n}": np.array(v, np.float32) for n, v in hypers.items()} | data
    anchors = {n: t * 0.9 for n, t in weights.items()}
    if problem.proximal:
        fixed |= {f"anchor.{n}": t.numpy() for n, t in anchors.items()}
    state = {f"param.{n}": t.numpy().copy() for n, t in weights.items()}
    state |= {f"slot.{s}.{n}": np.zeros_like(t.numpy()) for s in problem.optimizer.slots for n, t in weights.items()}
    problem.module.train()
    losses, final, slots = _reference(problem, data, weights, anchors, hypers)
    for step in range(STEPS):
        outputs = train(fixed | state)
        worst.see(_relative(outputs["loss"], losses[step], float(losses[0])), f"loss ({case}, step {step + 1})")
        state = {f"param.{n}": outputs[f"next.{n}"] for n in weights} | {
            f"slot.{s}.{n}": outputs[f"next.{s}.{n}"] for s in problem.optimizer.slots for n in weights
        }
    for name, start in weights.items():
        got, want, begin = state[f"param.{name}"], final[name].numpy(), start.numpy()
        scale = float(np.abs(want).max(initial=0))
        worst.see(_relative(got, want, 0), f"{name!r} ({case})")
        worst.see(_relative(got - begin, want - begin, LEAST_CHANGE * scale), f"the update of {name!r} ({case})")
        for slot in problem.optimizer.slots:
            floor = LEAST_CHANGE * scale
            worst.see(
                _relative(state[f"slot.{slot}.{name}"], slots[name].numpy(), floor), f"{slot} of {name!r} ({case})"
            )


def _reference(
    problem: Problem,
    data: Arrays,
    weights: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    hypers: Mapping[str, float],
) -> tuple[list[npt.NDArray[np.generic]], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, final weights and momentum of the same steps in plain PyTorch."""
    leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
    batch = {n: torch.from_numpy(a) for n, a in data.items()}
    optimizer = torch.optim.SGD(
        leaves.values(),
        lr=hypers["lr"],
        momentum=hypers.get("momentum", 0.0),
        weight_decay=hypers["weight_decay"],
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = problem.forward(leaves | problem.frozen, batch)
        loss = problem.loss.reference(*problem.arguments(outputs, batch))
        loss.backward()  # type: ignore[no-untyped-call]
        if problem.proximal:
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    leaf.grad += hypers["mu"] * (leaf.detach() - anchors[name])
        optimizer.step()
        losses.append(loss.detach().numpy())
    zero = {n: torch.zeros_like(t) for n, t in weights.items()}
    slots = {n: optimizer.state[leaf].get("momentum_buffer", zero[n]) for n, leaf in leaves.items()}
    return losses, {n: leaf.detach() for n, leaf in leaves.items()}, slots


def _compare_evaluation(problem: Problem, evaluate: Run, infer: Run, data: Arrays, case: str, worst: _Worst) -> None:
    weights = problem.trainable | problem.frozen
    feeds = {f"param.{n}": t.numpy() for n, t in weights.items()} | data
    problem.module.eval()
    with torch.no_grad():
        batch = {n: torch.from_numpy(a) for n, a in data.items()}
        outputs = problem.forward(weights, batch)
        given, count = problem.arguments(outputs, batch), problem.rows(batch, outputs)
        sums = {"loss": problem.loss.reference(*given) * count, "count": count} | problem.loss.metrics(*given)
    for name, got in infer(feeds).items():
        worst.see(_relative(got, outputs[name].numpy(), 0), f"output {name!r} ({case})")
    found = evaluate(feeds)
    for name, want in sums.items():
        if name == "correct":
            # Where two classes score alike up to rounding, either may come first: allow one in the batch.
            error = max(0.0, abs(float(found["sum.correct"]) - float(want)) - 1)
            worst.see(error, f"sum.{name} ({case})")
        else:
            worst.see(_relative(found[f"sum.{name}"], want.numpy(), 0), f"sum.{name} ({case})")


def _relative(got: npt.NDArray[np.generic], want: npt.NDArray[np.generic], floor: float) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not want.size:
        return 0.0
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    return float(difference / max(float(np.abs(want).max()), floor, 1e-7))
