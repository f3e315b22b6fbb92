"""What the server keeps of all clients' control variates, the counterpart of `edge_client.learning.variates`.

Each method is a frozen record of pure functions over an explicit state, which lies in the ledger beside the server
optimizer's. Sums over clients count each client alike, whatever `[aggregation] weights` says, as the papers do: clients
weigh in the mean that the model moves along, and what is optimized is the plain mean of their objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from broker_server.aggregation.optimizer import State
from broker_server.aggregation.streaming import Aggregator, Share, weighted_sum
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector


class Side(NamedTuple):
    """What the updates of a round come to beside the aggregate."""

    total: Vector
    """``[n_params] float32``: the sum of updates, each times what `Variates.factor` says."""
    updates: int
    """How many are in it."""


@dataclass(frozen=True, slots=True)
class Variates:
    """``init -> step*`` over an explicit state; arguments are never written to."""

    name: str
    """Of the state, for the ledger."""
    init: Callable[[int], State]
    """``init(n_params)``: the state before the first round."""
    factor: Callable[[Report], float]
    """``factor(report)``: how many times an update is added up beside the aggregate; one that counts 0 times is left
    out."""
    step: Callable[[State, Vector, Side, Vector | None], tuple[Vector, State]]
    """``step(state, aggregate, side, control)``: what the server optimizer is given in the place of the aggregate, and
    the next state; ``control`` is what clients were given with the version that they trained, None where that is zeros
    or nothing."""
    control: Callable[[State], Vector] | None = None
    """``control(state)``: what clients are given with the version that comes of it, where they are given anything."""


def beside(factor: Callable[[Report], float]) -> Aggregator:
    """The sum of updates, each times its ``factor(report)``; `PartialSum.sums` holds how many are in it."""

    def share(update: Vector, report: Report) -> Share:
        del update
        times = factor(report)
        return Share(times, (float(times != 0),))

    return weighted_sum(share, lambda sums: 1.0)
