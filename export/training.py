"""The training graph: the whole batch at once, or in slices; and what it needs in memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.accumulate import accumulate
from export.choice import Choices, has_depthwise
from export.graph import Graph
from export.inplace import make_in_place
from export.large import speed_up_large
from export.lower import Rule, lower
from export.memory import early_results_first, measure, plan
from export.optimize import optimize
from export.recompute import recompute
from export.step import SEED, TOTAL, Problem, slice_step, train_step, update_step
from export.trace import Traced, trace
from export.updates import STEP

PLANNED_BATCH = 32
"""The batch size that memory is planned for."""


@dataclass(frozen=True)
class Memory:
    """The plan of a step at `PLANNED_BATCH` rows.

    ``peak``: bytes that live at once beside the model, the batch and the results. ``rows``: how many pass at once, None
    for all. ``copies``: nodes that compute values again.
    """

    peak: int
    rows: int | None = None
    copies: int = 0


@dataclass(frozen=True)
class Training:
    """``train.onnx``, the problem that it solves, how its convolutions are computed, and what it needs."""

    problem: Problem
    graph: Graph
    choices: Choices
    memory: Memory


class Whole:
    """A step that passes the whole batch at once."""

    def __init__(self, problem: Problem, rules: Mapping[str, Rule], tune: bool) -> None:
        self._problem = problem
        step, fixed = train_step(problem)
        traced = trace(step, fixed, (*problem.inputs, *problem.targets), problem.module.train())
        self._choices = Choices(has_depthwise(traced), timed=tune)
        self._graph = _lowered(problem, traced, rules, self._choices)

    def training(self, budget: int | None = None) -> Training:
        """The step, as near to ``budget`` bytes as recomputation brings it."""
        graph, peak, copies = _fitted(self._graph, PLANNED_BATCH, budget)
        return Training(self._problem, graph, self._choices, Memory(peak, None, copies))


class Sliced:
    """A step that passes the batch in slices: traced once, for slices of any size."""

    def __init__(self, problem: Problem, rules: Mapping[str, Rule], tune: bool) -> None:
        self._problem = problem
        features, module = (*problem.inputs, *problem.targets), problem.module.train()
        step, fixed = slice_step(problem)
        traced = trace(step, fixed, features, module)
        self._choices = Choices(has_depthwise(traced), timed=tune)
        self._part = _lowered(problem, traced, rules, self._choices)
        prefix = f"next.{TOTAL}grad."
        reached = {name.removeprefix(prefix) for name in traced.outputs if name.startswith(prefix)}
        step, fixed = update_step(problem, reached)
        self._update = _lowered(problem, trace(step, fixed, (), module), rules, self._choices)
        self._batched = [feature.name for feature in features]

    def training(self, rows: int, budget: int | None = None) -> Training:
        """The step in slices of ``rows``, as near to ``budget`` bytes as recomputation brings it."""
        rows_at_once = min(rows, PLANNED_BATCH)
        sizes, _ = measure(self._part, rows_at_once)
        # What is carried into a slice, and what comes out of it, which is in the plan of the slice, are there at once.
        carried = sum(sizes[port.name] for port in self._part.outputs)
        cut = sum(sizes.get(name, 0) for name in self._batched)
        around = carried + cut
        inner = None if budget is None else max(0, budget - around)
        part, peak, copies = _fitted(self._part, rows_at_once, inner, replaces=False)
        graph = accumulate(part, self._update, self._batched, rows)
        make_in_place(graph)
        early_results_first(graph)
        memory = Memory(max(peak + around, _peak(graph, PLANNED_BATCH)), rows, copies)
        return Training(replace(self._problem, micro_batch=rows), graph, self._choices, memory)


def _peak(graph: Graph, batch: int, *, bound: bool = True) -> int:
    results = [port.name for port in graph.outputs]
    return plan(graph.nodes, measure(graph, batch)[0], results if bound else (), () if bound else results).peak


def _fitted(graph: Graph, batch: int, budget: int | None, *, replaces: bool = True) -> tuple[Graph, int, int]:
    """A copy of ``graph`` that fits, if that can be, with its peak and the number of nodes that recomputation took.

    ``replaces``: results have the memory of what they replace; else they are values among others.
    """
    best: tuple[Graph, int, int] | None = None
    # The way to a budget is greedy, and ordering updates may lengthen lives: another way may lead further.
    for target in (None,) if budget is None else (None, budget, budget * 9 // 10, 0):
        fitted = copy.deepcopy(graph)
        if target is not None:
            recompute(fitted, batch, target, bound=replaces)
        copies = len(fitted.nodes) - len(graph.nodes)
        if replaces:
            make_in_place(fitted)
        early_results_first(fitted)
        peak = _peak(fitted, batch, bound=replaces)
        if best is None or peak < best[1]:
            best = fitted, peak, copies
        if budget is not None and best[1] <= budget:
            break
    assert best is not None
    return best


def _lowered(problem: Problem, traced: Traced, rules: Mapping[str, Rule], choices: Choices) -> Graph:
    graph = lower(traced, rules, choices, (f"param.{name}" for name in problem.frozen))
    fix(graph, problem.frozen)
    speed_up_large(optimize(graph))
    early_results_first(graph)
    return graph


def fix(graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Make constants of the tensors.

    Integers that never change may be shapes or axes, which the runtime must know before values are handed over.
    """
    integers = {f"param.{n}": t.numpy() for n, t in tensors.items() if t.dtype in (torch.int64, torch.int32)}
    graph.prune()
    graph.embed(integers)
    graph.hand_over(f"param.{name}" for name in tensors)
    graph.drop_unused((STEP, SEED))
