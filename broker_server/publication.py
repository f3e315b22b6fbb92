"""The global model: its versions on the lattice, and the deltas that lead from one to another."""

import math
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from broker_server.aggregation.optimizer import ServerOptimizer, pack, unpack
from broker_server.config import Codec
from broker_server.ledger import Ledger, Round, Version
from edge_client.bundle import Bundle
from edge_client.codec.lattice import (
    EXPONENT_LIMIT,
    K_LIMIT,
    LatticeState,
    RawState,
    State,
    choose_exponent,
    place,
)
from edge_client.codec.layout import Vector
from edge_client.codec.model import Model, encode_model_delta, pack_model, unpack_model, untrained
from edge_client.errors import LedgerError

_ROOM = 2**20
"""Lattice steps between base and model that a finer step must not exceed: the model can move on from there."""
_RECENT = 10
"""Rounds over which the size of steps is averaged, about: one round's varies by a factor of two."""
_OUTLIER = 4.0
"""A step counts as at most this many times the average."""
_DELTAS = 2**20
"""Bytes of deltas kept, or those of one model in floats: memory is O(model) however many versions are in use."""
_CACHED = 8
"""Versions kept unpacked; others are read from the ledger when a client that holds one comes back."""


@dataclass(frozen=True)
class _Head:
    version: int
    model: Model
    remainder: Vector
    optimizer: Vector
    pace: float


class Publication:
    """All versions of one federation's model that a client may still hold.

    Raises:
        LedgerError: what the ledger holds does not fit the bundle or the settings.
    """

    def __init__(self, bundle: Bundle, ledger: Ledger, codec: Codec, optimizer: ServerOptimizer) -> None:
        self._bundle = bundle
        self._layout = bundle.layout
        self._base = bundle.initial()
        self._ledger = ledger
        self._codec = codec
        self._optimizer = optimizer
        self._buffers = bundle.initial_buffers()
        self._models: OrderedDict[int, Model] = OrderedDict()
        self._deltas: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._head = self._restore()

    @property
    def version(self) -> int:
        """The newest version; 0 is the bundle's weights."""
        return self._head.version

    @property
    def digest(self) -> bytes:
        """Hash of the newest version."""
        return self._head.model.digest()

    def digests(self, versions: Collection[int]) -> dict[int, bytes]:
        """Hashes of versions that are kept."""
        return {version: self._model(version).digest() for version in versions}

    def parameters(self, version: int | None = None) -> Vector:
        """``[n_params] float32``: the trainable parameters of a version, the newest by default."""
        return self._model(version).parameters(self._base)

    def buffers(self, version: int | None = None) -> Vector:
        """``[m] float32``: the buffers of a version, the newest by default."""
        return self._model(version).buffers

    def delta(self, held: int, version: int | None = None) -> bytes:
        """What leads a client from version ``held`` to ``version``, the newest by default; kept while there is room."""
        way = held, self.version if version is None else version
        found = self._deltas.pop(way, None)
        if found is None:
            found = encode_model_delta(self._model(held), self._model(version), self._layout)
        self._deltas[way] = found
        room = max(_DELTAS, 4 * self._layout.size)
        while len(self._deltas) > 1 and sum(map(len, self._deltas.values())) > room:
            self._deltas.popitem(last=False)
        return found

    def advance(
        self,
        aggregate: Vector,
        result: Round,
        *,
        closes: Collection[tuple[int, int]],
        keep: Collection[int],
        buffers: Vector | None = None,
    ) -> int:
        """Step the server optimizer along ``aggregate`` (``[n_params] float32``) and publish what comes of it.

        ``buffers`` (``[m] float32``) are published as they are; those of the version before unless given.

        Returns how many parameters were out of the lattice's reach and stay at its edge.

        What rounding to the lattice leaves out is kept and added the next time. The new version, the close of its
        tasks and the round's result are one transaction.
        """
        head = self._head
        step, optimizer = self._optimizer.step(head.optimizer, aggregate)
        target = head.model.parameters(self._base).astype(np.float64)
        target += step
        clipped, pace = 0, 0.0
        if self._codec.kind == "none":
            state: State = RawState(target.astype(np.float32))
            remainder = np.zeros(0, np.float32)
        else:
            if head.remainder.size:
                target += head.remainder
            before = head.model.state
            previous = before.exponent if isinstance(before, LatticeState) and head.version else None
            pace = self._pace(step, aggregate)
            exponent = choose_exponent(pace, self._codec.lattice, previous)
            exponent = self._bounded(exponent, previous, target)
            # What is out of the lattice's reach stays at its edge: an aggregate that diverged must not end the server.
            reach = math.ldexp(K_LIMIT - 1, exponent)
            clipped = int(np.count_nonzero(np.abs(target - self._base) > reach))
            np.clip(target, self._base - np.float64(reach), self._base + np.float64(reach), out=target)
            held = before if isinstance(before, LatticeState) else None
            state, remainder = place(target, self._base, exponent, held, self._codec.hysteresis)
        model = Model(state, head.model.buffers if buffers is None else buffers)
        self._head = _Head(head.version + 1, model, remainder, optimizer, pace)
        self._deltas.clear()
        with self._ledger.group():
            self._ledger.publish(
                Version(
                    version=self._head.version,
                    round=result.round,
                    state=pack_model(model),
                    remainder=remainder.astype("<f4").tobytes(),
                    optimizer=pack(optimizer),
                    pace=pace,
                ),
                closes=closes,
            )
            self._ledger.finish_round(result, finished=False)
            self._ledger.prune({*keep, head.version})
        self._remember(self._head.version, model)
        return clipped

    def _pace(self, step: Vector, aggregate: Vector) -> float:
        """Standard deviation of the latest steps, or of the aggregates where they are smaller, averaged.

        The exponent never rises again, so that it must not follow the smallest round that there was. Momentum makes
        steps larger, but not what clients learn in a round, which is what the lattice must not drown.
        """
        before = self._head.pace
        found = min(float(np.std(vector, dtype=np.float64)) for vector in (step, aggregate))
        if not (before > 0 and math.isfinite(found)):
            return found if math.isfinite(found) else before
        return before + (min(found, _OUTLIER * before) - before) / min(self._head.version + 1, _RECENT)

    def _bounded(self, exponent: int, previous: int | None, target: npt.NDArray[np.float64]) -> int:
        """The exponent, or a larger one where that would be too fine for where the model is; never above the last."""
        farthest = float(np.abs(target - self._base).max(initial=0.0))
        coarse = max(exponent, math.ceil(math.log2(farthest / _ROOM))) if farthest > 0 else exponent
        coarse = max(-EXPONENT_LIMIT, min(EXPONENT_LIMIT, coarse))
        return coarse if previous is None else min(coarse, previous)

    def _restore(self) -> _Head:
        latest = self._ledger.latest()
        start = self._optimizer.init(self._layout.size)
        if latest is None:
            return _Head(0, self._untrained(), np.zeros(0, np.float32), start, 0.0)
        model = unpack_model(latest.state, self._layout)
        if isinstance(model.state, RawState) != (self._codec.kind == "none"):
            raise LedgerError("the ledger was written with another codec.kind; set it back, or use a new state folder")
        remainder = np.frombuffer(latest.remainder, "<f4").astype(np.float32)
        return _Head(latest.version, model, remainder, unpack(latest.optimizer, start), latest.pace)

    def _untrained(self) -> Model:
        return untrained(self._layout.size, self._buffers)

    def _model(self, version: int | None) -> Model:
        if version is None or version == self._head.version:
            return self._head.model
        if version == 0:
            return self._untrained()
        model = self._models.get(version)
        if model is None:
            stored = self._ledger.version(version)
            if stored is None or not stored.state:
                raise LedgerError(f"version {version} of the model is not in the ledger any more")
            model = unpack_model(stored.state, self._layout)
        self._remember(version, model)
        return model

    def _remember(self, version: int, model: Model) -> None:
        self._models[version] = model
        self._models.move_to_end(version)
        while len(self._models) > _CACHED:
            self._models.popitem(last=False)
