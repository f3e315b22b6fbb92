"""Streaming aggregation: updates come one at a time, are added to a running sum and forgotten.

An aggregator is a frozen record of pure functions over an explicit state. Memory is that of one model, whatever the
number of clients; ``merge`` combines the partial sums of several servers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edge_client.codec.layout import Vector
from edge_client.errors import CodecError, TrainingError

# One block's float64 products stay in the second-level cache: adding is then bound by reading update and sum once.
_BLOCK = 1 << 14


@dataclass(frozen=True, slots=True)
class PartialSum:
    """What has been added so far."""

    total: npt.NDArray[np.float64]
    """``[n_params] float64``: sum of weight times update."""
    weight: float = 0.0
    """Sum of the weights."""
    updates: int = 0
    samples: int = 0


class Add(Protocol):
    """Adds one more update."""

    def __call__(self, state: PartialSum, update: Vector, samples: int, discount: float = 1.0) -> PartialSum:
        """``update`` (``[n_params] float32``) of that many samples, counted ``discount`` (0 to 1) times."""


@dataclass(frozen=True, slots=True)
class Aggregator:
    """``init -> add* -> finish``, with ``merge`` for partial sums made elsewhere.

    ``add`` and ``merge`` own their first argument: they may write into its buffer, so only what they return is valid.
    """

    init: Callable[[int], PartialSum]
    """``init(n_params)``: the empty sum."""
    add: Add
    """``add(state, update, samples)``: one more update, ``[n_params] float32``, of that many samples."""
    merge: Callable[[PartialSum, PartialSum], PartialSum]
    """``merge(state, other)``: both together; ``other`` is left alone."""
    finish: Callable[[PartialSum], Vector]
    """``finish(state)``: the aggregate, ``[n_params] float32``."""


def fedavg(weights: Literal["samples", "uniform"] = "samples") -> Aggregator:
    """The weighted mean of updates, ``sum(p_k * update_k)`` (FedAvg, McMahan et al. 2017).

    ``p_k = n_k / sum(n)`` with "samples", ``1 / clients`` with "uniform". Sums are kept in float64, in which a product
    of a float32 and a sample count below 2^29 is exact. Updates must be finite: one NaN would take the sum with it.
    A discount shortens what its update adds and not the divisor, so that a mean of old updates is a shorter step
    (FedBuff, Nguyen et al. 2022).

    Raises (from the functions of the record):
        CodecError: ``add`` and ``merge``, when lengths or dtypes differ.
        TrainingError: ``add``, for a negative sample count; ``finish``, when all weights together are zero.
    """

    def add(state: PartialSum, update: Vector, samples: int, discount: float = 1.0) -> PartialSum:
        if update.shape != state.total.shape or update.dtype != np.float32:
            raise CodecError(
                f"update is {update.dtype} {list(update.shape)}; expected float32 {list(state.total.shape)}"
            )
        if samples < 0:
            raise TrainingError(f"update counts {samples} samples; expected none or more")
        weight = float(samples) if weights == "samples" else 1.0
        products = np.empty(min(_BLOCK, update.size), np.float64)
        for start in range(0, update.size, _BLOCK):
            block = update[start : start + _BLOCK]
            scaled = np.multiply(block, weight * discount, out=products[: block.size], dtype=np.float64)
            state.total[start : start + _BLOCK] += scaled
        return PartialSum(state.total, state.weight + weight, state.updates + 1, state.samples + samples)

    return Aggregator(_init, add, _merge, _mean)


def _init(size: int) -> PartialSum:
    return PartialSum(np.zeros(size, np.float64))


def _merge(state: PartialSum, other: PartialSum) -> PartialSum:
    if state.total.shape != other.total.shape:
        raise CodecError(f"partial sums hold {state.total.size} and {other.total.size} parameters; expected the same")
    np.add(state.total, other.total, out=state.total)
    return PartialSum(
        state.total, state.weight + other.weight, state.updates + other.updates, state.samples + other.samples
    )


def _mean(state: PartialSum) -> Vector:
    if state.weight <= 0:
        raise TrainingError(
            f"{state.updates} updates weigh nothing together ({state.samples} samples); "
            'expected at least one sample, or aggregation.weights = "uniform"'
        )
    mean = np.empty(state.total.shape, np.float32)
    np.divide(state.total, state.weight, out=mean, casting="same_kind")
    return mean
