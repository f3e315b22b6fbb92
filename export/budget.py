"""A training graph that keeps to a memory budget: slices of the batch, recomputation, or both."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from edge_client.errors import ExportError
from edge_client.manifest import Feature
from export import modes
from export.dropout import DropoutMode
from export.lower import Rule
from export.memory import format_size
from export.step import Problem
from export.training import PLANNED_BATCH, Sliced, Training, Whole

_PLAIN_ROWS, _ROWS = (16, 8, 4), (16, 8, 4, 2, 1)
_PRECISION = 1e-4


def training_graph(
    problem: Problem, rules: Mapping[str, Rule], budget: int | None = None, tune: bool = False
) -> Training:
    """The training graph of a problem; with a ``budget`` in bytes, one that is planned to need no more.

    ``tune``: formulations of convolutions are measured.

    Where a slice of the batch gives what it gives within the whole batch, slices come first: what is smaller stays in
    the cache, and where activations are what takes memory, a step takes about as long (0.85 to 1.05 times in slices of
    8 and 16 rows; 1.1 to 1.3 in the McMahan CNN, which has 6.6 MB of gradients to add up). Elsewhere, as with batch
    normalisation, recomputation does.

    Raises:
        ExportError: nothing fits; the message says the least budget that something does.
    """
    if problem.micro_batch is not None:
        attempts = iter([Sliced(problem, rules, tune).training(problem.micro_batch, budget)])
    elif budget is None:
        attempts = iter([Whole(problem, rules, tune).training()])
    else:
        attempts = _attempts(problem, rules, budget, tune)
    least: int | None = None
    for training in attempts:
        if budget is None or training.memory.peak <= budget:
            return training
        least = min(training.memory.peak, least or training.memory.peak)
    raise ExportError(
        f"the memory budget is {format_size(budget or 0)}; a step at batch {PLANNED_BATCH} needs at least "
        f"{format_size(least or 0, up=True)}, whatever is computed again: raise the budget to that"
    )


def _attempts(problem: Problem, rules: Mapping[str, Rule], budget: int, tune: bool) -> Iterator[Training]:
    whole = Whole(problem, rules, tune)
    yield whole.training()
    separate = rows_are_separate(problem)
    sliced: Sliced | None = None
    if separate:
        sliced = Sliced(problem, rules, tune)
        for rows in _PLAIN_ROWS:
            yield sliced.training(rows)
    # Without the sums of gradients: in a large model with few activations they are what takes memory.
    yield whole.training(budget)
    sliced = sliced or Sliced(problem, rules, tune)
    # Statistics of a single row are none.
    for rows in _ROWS if separate else _ROWS[:-1]:
        yield sliced.training(rows, budget)


class _WithoutDropout(DropoutMode):
    """Dropout that keeps everything: the masks of slices differ, which says nothing about rows."""

    def drop(self, x: Tensor, p: float) -> Tensor:
        """``x`` as it is."""
        return x


def rows_are_separate(problem: Problem) -> bool:
    """Whether outputs and loss of a batch are those of its halves: not where rows are normalised or compared."""
    # Its weights may begin at zero and show nothing.
    if any(isinstance(part, _BatchNorm) for part in problem.module.modules()):
        return False
    generator = torch.Generator().manual_seed(0)
    batch = {feature.name: _random(feature, 4, generator) for feature in (*problem.inputs, *problem.targets)}
    halves = [{n: t[start : start + 2] for n, t in batch.items()} for start in (0, 2)]
    results = [_passed(problem, part) for part in (batch, *halves)]
    joined = [torch.cat(parts) for parts in zip(*(result[0] for result in results[1:]), strict=True)]
    counts = torch.stack([count for _, _, count in results[1:]])
    loss = (torch.stack([loss for _, loss, _ in results[1:]]) * counts).sum() / counts.sum().clamp_min(1e-30)
    pairs = itertools.chain(zip(results[0][0], joined, strict=True), [(results[0][1], loss)])
    return all(torch.allclose(one, other, rtol=_PRECISION, atol=_PRECISION) for one, other in pairs)


def _passed(problem: Problem, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    problem.module.train()
    zero = torch.tensor(0)
    state = {name: tensor.clone() for name, tensor in problem.state.items()}
    with torch.no_grad(), modes.reference(), _WithoutDropout(zero, zero):
        outputs = problem.forward(state, batch)
        given = problem.arguments(outputs, batch)
        return list(outputs.values()), problem.loss.reference(*given), problem.rows(batch, outputs)


def _random(feature: Feature, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, *feature.shape)
    if feature.dtype == "float32":
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 2, shape, generator=generator)
