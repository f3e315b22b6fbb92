"""Server optimizers: how far the global model moves along a round's aggregate."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.errors import LedgerError

_FORMAT = b"\x01"


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """``init -> step*`` over one flat state vector, ``[n_state] float32``; ``n_state`` may be 0."""

    init: Callable[[int], Vector]
    """``init(n_params)``: the state before the first round."""
    step: Callable[[Vector, Vector], tuple[Vector, Vector]]
    """``step(state, aggregate)``: what to add to the parameters (``[n_params] float32``), and the next state."""


def sgd(learning_rate: float = 1.0, momentum: float = 0.0) -> ServerOptimizer:
    """``v = momentum * v + aggregate; w = w + learning_rate * v``.

    Plain FedAvg at learning rate 1 and momentum 0 (McMahan et al. 2017), FedAvgM with momentum (Hsu et al. 2019).
    Arguments are never written to. Without momentum there is no state.
    """

    def init(size: int) -> Vector:
        return np.zeros(size if momentum else 0, np.float32)

    def step(state: Vector, aggregate: Vector) -> tuple[Vector, Vector]:
        if not momentum:
            return aggregate * np.float32(learning_rate), state
        velocity = state * np.float32(momentum) + aggregate
        return velocity * np.float32(learning_rate), velocity

    return ServerOptimizer(init, step)


def pack(state: Vector) -> bytes:
    """An optimizer's state as bytes for the ledger: a format byte, then little-endian float32."""
    return _FORMAT + state.astype("<f4", copy=False).tobytes()


def unpack(data: bytes, like: Vector) -> Vector:
    """The state that ``pack`` was given; ``like`` is a state of the same optimizer, such as ``init(n_params)``.

    Raises:
        LedgerError: another format, or a state of another length: the ledger was written with another optimizer.
    """
    if data[:1] != _FORMAT:
        raise LedgerError(f"optimizer state has format {data[:1].hex() or 'none'}; expected {_FORMAT.hex()}")
    if len(data) - 1 != like.nbytes:
        raise LedgerError(
            f"optimizer state in the ledger is {len(data) - 1} bytes; expected {like.nbytes}: "
            "was aggregation.momentum changed? Set it back, or start with a new state folder"
        )
    return np.frombuffer(data, "<f4", offset=1).astype(np.float32)
