"""FedDyn: each client's objective is corrected so that all agree (Acar et al. 2021, arXiv 2111.04263, algorithm 1).

A client minimizes ``L_i(w) - <g_i, w> + alpha / 2 ||w - received||^2`` and then takes ``alpha d_i`` from ``g_i``, with
``d_i`` its update. The server's ``h`` falls by ``alpha / N sum(d_i)``, and the model becomes the mean of what clients
came to, less ``h / alpha``. Here ``h`` is kept as ``drift = -h / alpha``, in units of parameters, in which ``alpha``
does not appear:

    drift = drift + 1 / N sum(d_i)        step = mean(d_i) + drift

The step goes through the server optimizer, whose learning rate is 1 in the paper.
"""

from typing import Annotated

import numpy as np
from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Everyone
from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.optimizer import State
from broker_server.aggregation.variates import Side, Variates
from edge_client.codec.layout import Vector
from edge_client.wire.messages import CORRECTION


class Dynamic(Everyone, frozen=True):
    """``alpha``: how strongly clients are held near the model that they received; with more they learn less a round."""

    alpha: Annotated[float, Meta(gt=0, le=1e6)] = 0.1


def feddyn(clients: int) -> Variates:
    """The server's part of it, of so many clients in all."""

    def step(state: State, aggregate: Vector, side: Side, control: Vector | None) -> tuple[Vector, State]:
        del control
        total = state[0] + side.total
        drift: Vector = total / np.float32(clients)
        return aggregate + drift, (total,)

    return Variates("feddyn", lambda size: (np.zeros(size, np.float32),), lambda _: 1.0, step)


ALGORITHM = Algorithm(
    make=lambda options, local: fedavg(),
    options=Dynamic,
    needs=(CORRECTION,),
    method="feddyn",
    exported=("control", "proximal"),
    hypers=lambda options: {"mu": options.alpha},
    variates=lambda options: feddyn(options.clients),
)
