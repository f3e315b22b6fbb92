"""Server optimizers: how far the global model moves along a round's aggregate.

They are chained like gradient transformations: each part takes what the one before it made of the aggregate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_client.codec.layout import Vector
from edge_client.errors import LedgerError

State = tuple[Vector, ...]
"""What an optimizer carries from round to round: vectors, each ``[n_params] float32``; perhaps none."""

_PLAIN, _NAMED = b"\x01", b"\x02"
"""Format of a state: vectors alone, of no optimizer but momentum; or its name (a length, then ASCII) before them."""


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """``init -> step*`` over an explicit state; arguments are never written to."""

    name: str
    """Of what has a state, for the ledger: a state of one optimizer is not read by another."""
    init: Callable[[int], State]
    """``init(n_params)``: the state before the first round."""
    step: Callable[[State, Vector, int], tuple[Vector, State]]
    """``step(state, aggregate, count)``: what to add to the parameters (``[n_params] float32``), and the next state;
    ``count`` are the steps that were made before."""


def chain(*parts: ServerOptimizer) -> ServerOptimizer:
    """All parts, one after the other; the state is that of all of them, end to end."""

    def init(size: int) -> State:
        return tuple(vector for part in parts for vector in part.init(size))

    def step(state: State, aggregate: Vector, count: int) -> tuple[Vector, State]:
        following: list[Vector] = []
        for part, own in zip(parts, _shared_out(state), strict=True):
            aggregate, new = part.step(own, aggregate, count)
            following.extend(new)
        return aggregate, tuple(following)

    lengths = [len(part.init(0)) for part in parts]

    def _shared_out(state: State) -> list[State]:
        return [state[sum(lengths[:at]) : sum(lengths[: at + 1])] for at in range(len(parts))]

    return ServerOptimizer("+".join(part.name for part in parts if part.name), init, step)


def scale_by(rate: Callable[[int], float]) -> ServerOptimizer:
    """The learning rate, ``rate(count)``."""
    return ServerOptimizer("", _stateless, lambda state, aggregate, count: (aggregate * np.float32(rate(count)), state))


def trace(momentum: float) -> ServerOptimizer:
    """``v = momentum * v + aggregate`` (FedAvgM, Hsu et al. 2019, arXiv 1909.06335); without momentum nothing."""
    if not momentum:
        return ServerOptimizer("", _stateless, lambda state, aggregate, count: (aggregate, state))

    def step(state: State, aggregate: Vector, count: int) -> tuple[Vector, State]:
        del count
        velocity = state[0] * np.float32(momentum)
        velocity += aggregate
        return velocity, (velocity,)

    return ServerOptimizer("momentum", lambda size: (np.zeros(size, np.float32),), step)


def adaptive(kind: Literal["adam", "yogi", "adagrad"], beta1: float, beta2: float, tau: float) -> ServerOptimizer:
    """``m / (sqrt(v) + tau)`` (FedAdam, FedYogi, FedAdagrad: Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    ``m = beta1 m + (1 - beta1) d`` of the aggregates ``d``, without bias correction, and

    =======  ===========================================
    adam     ``v = beta2 v + (1 - beta2) d^2``
    yogi     ``v = v - (1 - beta2) d^2 sign(v - d^2)``
    adagrad  ``v = v + d^2``
    =======  ===========================================

    from ``v = tau^2``. Where ``beta1`` is 0 there is no ``m``.
    """

    def init(size: int) -> State:
        second = np.full(size, tau * tau, np.float32)
        return (np.zeros(size, np.float32), second) if beta1 else (second,)

    def step(state: State, aggregate: Vector, count: int) -> tuple[Vector, State]:
        del count
        *first, before = state
        if first:
            moved = first[0] * np.float32(beta1)
            moved += np.float32(1 - beta1) * aggregate
        else:
            moved = aggregate
        squares = np.square(aggregate)
        match kind:
            case "adam":
                second = before * np.float32(beta2)
                second += np.float32(1 - beta2) * squares
            case "yogi":
                second = before - np.float32(1 - beta2) * squares * np.sign(before - squares)
            case "adagrad":
                second = before + squares
        divisor = np.sqrt(second)
        divisor += np.float32(tau)
        return moved / divisor, (moved, second) if first else (second,)

    return ServerOptimizer(kind if beta1 else f"{kind} without momentum", init, step)


def _stateless(size: int) -> State:
    del size
    return ()


def pack(name: str, state: State) -> bytes:
    """An optimizer's state as bytes for the ledger: what it is, then little-endian float32."""
    head = _PLAIN if name in ("", "momentum") else _NAMED + bytes([len(name)]) + name.encode("ascii")
    return head + b"".join(vector.astype("<f4", copy=False).tobytes() for vector in state)


def unpack(data: bytes, name: str, like: State) -> State:
    """The state that ``pack`` was given; ``like`` is one of the same optimizer, such as ``init(n_params)``.

    Raises:
        LedgerError: another format, or the state of another optimizer: the ledger was written with other settings.
    """
    if data[:1] not in (_PLAIN, _NAMED):
        raise LedgerError(f"optimizer state has format {data[:1].hex() or 'none'}; expected 01 or 02")
    start, found = 1, "momentum" if len(data) > 1 else ""
    if data[:1] == _NAMED:
        start = 2 + data[1]
        found = data[2:start].decode("ascii", "replace")
    expected = sum(vector.nbytes for vector in like)
    if found != name or len(data) - start != expected:
        raise LedgerError(
            f"optimizer state in the ledger is {len(data) - start} bytes of {found or 'none'}; expected {expected} of "
            f"{name or 'none'}: was [server] or aggregation.algorithm changed? Set it back, or start with a new state "
            "folder"
        )
    vectors = []
    for vector in like:
        vectors.append(np.frombuffer(data, "<f4", vector.size, start).astype(np.float32))
        start += vector.nbytes
    return tuple(vectors)
