"""q-FedAvg: clients on which the model is worse count more (q-FFL, Li et al. 2020, arXiv 1905.10497).

With ``F_k`` the loss of the model as received on client ``k``'s own data, and ``L`` one over its learning rate, the
model moves by ``sum(D_k) / sum(h_k)`` where

    D_k = F_k^q * L * update_k        h_k = q * F_k^(q - 1) * ||L * update_k||^2 + L * F_k^q

The paper draws clients by ``p_k``; here all are drawn alike, so both are weighted by it. ``q = 0`` is FedAvg.
"""

from typing import Annotated

from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.streaming import Aggregator, Share, weighted_sum
from broker_server.aggregation.weighting import Report, square_norm
from edge_client.codec.layout import Vector
from edge_client.wire.messages import RECEIVED_LOSS

_LEAST_LOSS = 1e-10
"""A client without any loss would divide by zero where ``q`` is below 1."""


class Fairness(Options, frozen=True):
    """``q``: 0 minimizes the mean loss; the larger it is, the more even losses are."""

    q: Annotated[float, Meta(ge=0, le=10)] = 1.0


def qfedavg(q: float, learning_rate: float) -> Aggregator:
    """q-FedAvg, where clients train with this learning rate; updates report the loss of the model as received."""
    lipschitz = 1.0 / learning_rate

    def share(update: Vector, report: Report) -> Share:
        loss = report.scalars[RECEIVED_LOSS] + _LEAST_LOSS
        raised = report.weight * loss**q
        curvature = q * lipschitz**2 * report.scale**2 * square_norm(update) / loss if q else 0.0
        return Share(raised * lipschitz * report.scale, (raised * (curvature + lipschitz),))

    return weighted_sum(share, lambda sums: sums[0])


ALGORITHM = Algorithm(
    make=lambda options, local: qfedavg(options.q, local.rate("qfedavg")),
    options=Fairness,
    needs=(RECEIVED_LOSS,),
)
