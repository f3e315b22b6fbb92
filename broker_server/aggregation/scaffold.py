"""SCAFFOLD: control variates on both sides (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, option II).

A client corrects each gradient by ``c - c_i`` and takes the mean of its gradients as its next ``c_i``. With ``d_i`` its
update and ``K_i lr`` the ``distance`` of its steps, its ``c_i`` grows by ``-c - d_i / (K_i lr)``: the server knows it
from the update alone, and nothing more is sent up. ``c`` here is the one that clients were given, which the codec has
rounded; so the server's own, exact one stays the mean of all ``c_i``:

    c = c + 1 / N sum(-c - d_i / (K_i lr))

The model moves along the mean of updates as with FedAvg, by any server optimizer; the paper's is ``sgd``.
"""

import numpy as np

from broker_server.aggregation.algorithm import Algorithm, Everyone
from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.optimizer import State
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.variates import Side, Variates
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector
from edge_client.errors import ConfigError
from edge_client.wire.messages import CORRECTION, DISTANCE


def scaffold(clients: int) -> Variates:
    """The server's control variate, of so many clients in all; updates report the ``distance`` of their steps."""

    def step(state: State, aggregate: Vector, side: Side, control: Vector | None) -> tuple[Vector, State]:
        known = state[0] - side.total
        return aggregate, (known if control is None else known - np.float32(side.updates) * control,)

    def factor(report: Report) -> float:
        # Who kept the model as it was received, for want of a better one, has no new estimate either.
        distance = report.scalars[DISTANCE]
        return 1.0 / distance if distance else 0.0

    return Variates(
        "scaffold",
        # The sum of all c_i and not their mean, so that it holds when more clients join.
        lambda size: (np.zeros(size, np.float32),),
        factor,
        step,
        lambda state: state[0] / np.float32(clients),
    )


def _make(options: Everyone, local: LocalTraining) -> Aggregator:
    local.linear("scaffold")
    local.rate("scaffold")
    if local.falls and (local.optimizer != "sgd" or local.proximal):
        raise ConfigError(
            'scaffold cannot be combined with a train.schedule that is not "constant" where steps have momentum or a '
            "proximal term: how far they go depends on the order of the rates; expected plain sgd, or a constant one"
        )
    return fedavg()


ALGORITHM = Algorithm(
    make=_make,
    options=Everyone,
    needs=(DISTANCE, CORRECTION),
    least=lambda local: {DISTANCE: 0.99 * local.learning_rate * min(local.distance(1), local.distance(2))},
    method="scaffold",
    exported=("control",),
    variates=lambda options: scaffold(options.clients),
)
