"""What one update counts: stages that set its weight in the aggregate, or shorten it, before it is aggregated.

A stage is a pure function from what came with an update, and its vector, to the same with another weight or scale;
stages are chained like gradient transformations.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.errors import TrainingError

_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Report:
    """What came with an update beside its vector, and what the server makes of it."""

    client: str = ""
    samples: int = 1
    scalars: Mapping[str, float] = field(default_factory=dict)
    """What the client said of its training: ``steps``, ``loss`` and the like."""
    age: int = 0
    """How many versions older than the newest the one is that it was trained on."""
    weight: float = 1.0
    """Its weight in the aggregate, before all are divided by their sum."""
    scale: float = 1.0
    """Its vector counts as this many times itself, while the weight stays: below 1 it is a shorter step."""


Stage = Callable[[Report, Vector], Report]
"""``stage(report, update)``: the report, changed; the update, ``[n_params] float32``, is only looked at."""


def chain(*stages: Stage) -> Stage:
    """All stages, one after the other."""
    return lambda report, update: functools.reduce(lambda known, stage: stage(known, update), stages, report)


def by_samples(report: Report, update: Vector) -> Report:
    """The weight of McMahan et al. 2017, ``n_k``.

    Raises:
        TrainingError: it is below zero.
    """
    del update
    if report.samples < 0:
        raise TrainingError(f"update counts {report.samples} samples; expected none or more")
    return replace(report, weight=float(report.samples))


def uniform(report: Report, update: Vector) -> Report:
    """The same weight for all."""
    del update
    return replace(report, weight=1.0)


def by_client(factors: Mapping[str, float]) -> Stage:
    """Weights times a factor by the client's id; of several patterns (``pi-*``) the first that fits holds."""

    def stage(report: Report, update: Vector) -> Report:
        del update
        fitting = (factor for pattern, factor in factors.items() if fnmatchcase(report.client, pattern))
        return replace(report, weight=report.weight * next(fitting, 1.0))

    return stage


def discounted(exponent: float) -> Stage:
    """``(1 + s)^-exponent`` of an update that is ``s`` versions old (FedBuff, Nguyen et al. 2022).

    The weight stays, so that a mean of old updates is a shorter step.
    """

    def stage(report: Report, update: Vector) -> Report:
        del update
        return replace(report, scale=report.scale * float((1.0 + report.age) ** -exponent))

    return stage


def bounded(norm: float) -> Stage:
    """Norm bounding: an update that is longer than ``norm`` (L2) is shortened to it (Sun et al. 2019)."""

    def stage(report: Report, update: Vector) -> Report:
        length = report.scale * float(np.sqrt(square_norm(update)))
        return replace(report, scale=report.scale * norm / length) if length > norm else report

    return stage


def square_norm(vector: Vector) -> float:
    """The sum of squares of ``[n] float32``, added in float64, a block in memory at a time."""
    total = 0.0
    for start in range(0, vector.size, _BLOCK):
        block = vector[start : start + _BLOCK].astype(np.float64)
        total += float(np.einsum("i,i->", block, block))
    return total
