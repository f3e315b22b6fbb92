"""Streaming aggregation: updates come one at a time, are added to a running sum and forgotten.

An aggregator is a frozen record of pure functions over an explicit state. Memory is that of one model, whatever the
number of clients; ``merge`` combines the partial sums of several servers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector
from edge_client.errors import CodecError, TrainingError

# One block's float64 products stay in the second-level cache: adding is then bound by reading update and sum once.
_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class PartialSum:
    """What has been added so far."""

    total: npt.NDArray[np.float64]
    """``[n_params] float64``: sum of updates, each times its factor."""
    sums: tuple[float, ...] = ()
    """Sums of what each update brings to the divisor; none before the first."""
    updates: int = 0
    samples: int = 0


class Share(NamedTuple):
    """How one update enters a sum."""

    factor: float
    """It is added so many times."""
    sums: tuple[float, ...]
    """What it adds to `PartialSum.sums`; as many numbers for every update."""


@dataclass(frozen=True, slots=True)
class Aggregator:
    """``init -> add* -> finish``, with ``merge`` for partial sums made elsewhere.

    ``add`` and ``merge`` own their first argument: they may write into its buffer, so only what they return is valid.
    """

    init: Callable[[int], PartialSum]
    """``init(n_params)``: the empty sum."""
    add: Callable[[PartialSum, Vector, Report], PartialSum]
    """``add(state, update, report)``: one more update, ``[n_params] float32``."""
    merge: Callable[[PartialSum, PartialSum], PartialSum]
    """``merge(state, other)``: both together; ``other`` is left alone."""
    finish: Callable[[PartialSum], Vector]
    """``finish(state)``: the aggregate, ``[n_params] float32``."""


def weighted_sum(share: Callable[[Vector, Report], Share], divisor: Callable[[tuple[float, ...]], float]) -> Aggregator:
    """The sum of all updates, each times its ``share(update, report)``, over ``divisor(sums)``.

    Sums are kept in float64, in which a product of a float32 and a whole number below 2^29 is exact. Updates must be
    finite: one NaN would take the sum with it.

    Raises (from the functions of the record):
        CodecError: ``add`` and ``merge``, when lengths or dtypes differ.
        TrainingError: ``finish``, when nothing was added, or all of it weighs nothing.
    """

    def add(state: PartialSum, update: Vector, report: Report) -> PartialSum:
        if update.shape != state.total.shape or update.dtype != np.float32:
            raise CodecError(
                f"update is {update.dtype} {list(update.shape)}; expected float32 {list(state.total.shape)}"
            )
        factor, sums = share(update, report)
        products = np.empty(min(_BLOCK, update.size), np.float64)
        for start in range(0, update.size, _BLOCK):
            block = update[start : start + _BLOCK]
            # Widened first and multiplied in place: a product that casts as it goes takes a third longer.
            scaled = products[: block.size]
            scaled[:] = block
            scaled *= factor
            state.total[start : start + _BLOCK] += scaled
        return PartialSum(state.total, _together(state.sums, sums), state.updates + 1, state.samples + report.samples)

    def finish(state: PartialSum) -> Vector:
        over = divisor(state.sums) if state.updates else 0.0
        if not over > 0:
            raise TrainingError(
                f"{state.updates} updates weigh nothing together ({state.samples} samples); "
                'expected at least one sample, or aggregation.weights = "uniform"'
            )
        mean = np.empty(state.total.shape, np.float32)
        np.divide(state.total, over, out=mean, casting="same_kind")
        return mean

    return Aggregator(lambda size: PartialSum(np.zeros(size, np.float64)), add, _merge, finish)


def _merge(state: PartialSum, other: PartialSum) -> PartialSum:
    if state.total.shape != other.total.shape:
        raise CodecError(f"partial sums hold {state.total.size} and {other.total.size} parameters; expected the same")
    np.add(state.total, other.total, out=state.total)
    return PartialSum(
        state.total,
        _together(state.sums, other.sums),
        state.updates + other.updates,
        state.samples + other.samples,
    )


def _together(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0.0))
