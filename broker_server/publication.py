"""The global model: its versions, and the deltas that lead from one to another."""

import math
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from broker_server.aggregation.gathering import Gathered
from broker_server.aggregation.optimizer import ServerOptimizer, State, pack, unpack
from broker_server.aggregation.variates import Variates
from broker_server.coding import Coder, code_at
from broker_server.config import Codec
from broker_server.ledger import Ledger
from broker_server.records import Round, Version
from edge_client.bundle import Bundle
from edge_client.codec.control import coded_control, decode_control, raw_control
from edge_client.codec.layout import Vector
from edge_client.codec.model import Model, encode_model_delta, pack_model, unpack_model, untrained
from edge_client.codec.quantize import rms
from edge_client.codec.versions import CodedState, RawState
from edge_client.codec.versions import State as ModelState
from edge_client.errors import CodecError, LedgerError

_FARTHEST = 1e12
"""A parameter stays where it is rather than go farther from the bundle's weights than this."""
_RECENT = 10
"""Rounds over which the size of steps is averaged, about: one round's varies by a factor of two."""
_OUTLIER = 4.0
"""A step counts as at most this many times the average."""
_EARLY, _FINEST = 0.04, 1 / 3
"""Share of all that the model has learned, and of the size of rounds' aggregates, in which noise is measured early."""
_CONTROL_NOISE = 0.5
"""A control leaves out this share of its energy, for those of later versions to tell: finer ones taught no better."""
_DELTAS = 2**20
"""Bytes of deltas kept, or those of one model in floats: memory is O(model) however many versions are in use."""


@dataclass(frozen=True)
class _Head:
    version: int
    model: Model
    remainder: Vector
    withheld: Vector
    """What coding has left out of the controls so far; of no elements where it leaves nothing out."""
    variates: State
    optimizer: State
    pace: float
    coder: Coder


class Publication:
    """All versions of one federation's model that a client may still hold.

    ``variates`` is what is kept of clients' control variates, if they have any: it turns the aggregate into what the
    optimizer steps along, and its state lies before the optimizer's.

    Raises:
        LedgerError: what the ledger holds does not fit the bundle or the settings.
    """

    def __init__(
        self,
        bundle: Bundle,
        ledger: Ledger,
        codec: Codec,
        optimizer: ServerOptimizer,
        variates: Variates | None = None,
    ) -> None:
        self._bundle = bundle
        self._layout = bundle.layout
        self._base = bundle.initial()
        self._ledger = ledger
        self._codec = codec
        self._optimizer = optimizer
        self._variates = variates
        self._name = "+".join(name for name in (variates.name if variates else "", optimizer.name) if name)
        self._buffers = bundle.initial_buffers()
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

    @property
    def pace(self) -> float:
        """What the noise of aggregates is measured in: how far an element moves in a round.

        Standard deviation of rounds' aggregates, averaged; in the first rounds less, down to a third, while that is
        much of all that the model has learned: what noise delays then, everything after it lacks. 0 before the first
        round and without a codec.
        """
        pace, state = self._head.pace, self._head.model.state
        if not pace or isinstance(state, RawState):
            return 0.0
        return min(pace, max(_FINEST * pace, _EARLY * rms(state.offset)))

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
            found = encode_model_delta(self._model(held), self._model(version))
        self._deltas[way] = found
        room = max(_DELTAS, 4 * self._layout.size)
        while len(self._deltas) > 1 and sum(map(len, self._deltas.values())) > room:
            self._deltas.popitem(last=False)
        return found

    def advance(
        self, gathered: Gathered, result: Round, *, closes: Collection[tuple[int, int]], keep: Collection[int]
    ) -> int:
        """Step the server optimizer along the aggregate and publish what comes of it.

        Buffers are published as they are; those of the version before where updates bring none.

        Returns how many parameters would have gone out of all bounds and stay where they were.

        What coding leaves out is kept and added the next time. The new version, the close of its
        tasks and the round's result are one transaction.
        """
        head, aggregate = self._head, gathered.aggregate
        direction, variates, control, withheld = self._corrected(gathered)
        step, optimizer = self._optimizer.step(head.optimizer, direction, head.version)
        target = head.model.parameters(self._base).astype(np.float64)
        target += step
        clipped, pace, coder = 0, 0.0, head.coder
        if self._codec.kind == "none":
            state: ModelState = RawState(target.astype(np.float32))
            remainder = np.zeros(0, np.float32)
        else:
            if head.remainder.size:
                target += head.remainder
            target -= self._base
            # An aggregate that diverged must not end the server.
            wild = ~(np.abs(target) < _FARTHEST)
            clipped = int(np.count_nonzero(wild))
            if clipped:
                target[wild] = (head.model.parameters(self._base).astype(np.float64) - self._base)[wild]
            pace = self._pace(step, aggregate)
            state, coder = head.coder.encode(target, self._codec.model_step * pace)
            target += self._base
            target -= state.parameters(self._base)
            remainder = target.astype(np.float32)
        model = Model(state, head.model.buffers if gathered.buffers is None else gathered.buffers, control)
        self._head = _Head(head.version + 1, model, remainder, withheld, variates, optimizer, pace, coder)
        self._deltas.clear()
        with self._ledger.group():
            self._ledger.publish(
                Version(
                    version=self._head.version,
                    round=result.round,
                    state=pack_model(model),
                    remainder=remainder.astype("<f4").tobytes() + withheld.astype("<f4").tobytes(),
                    optimizer=pack(self._name, (*variates, *optimizer)),
                    pace=pace,
                    anchor=self._head.version - coder.age,
                ),
                closes=closes,
            )
            self._ledger.finish_round(result, finished=False)
            self._ledger.prune({*keep, head.version})
        return clipped

    def _corrected(self, gathered: Gathered) -> tuple[Vector, State, bytes, Vector]:
        """What the optimizer steps along, the variates' next state, the control of the next version, and what coding
        has left out of controls."""
        head, kept = self._head, self._variates
        if kept is None:
            return gathered.aggregate, (), b"", head.withheld
        assert gathered.side is not None
        given = head.model.control_vector(self._layout)
        direction, variates = kept.step(head.variates, gathered.aggregate, gathered.side, given)
        if kept.control is None:
            return direction, variates, b"", head.withheld
        exact = kept.control(variates)
        exact[~(np.abs(exact) < _FARTHEST)] = 0.0
        if self._codec.kind == "none":
            return direction, variates, raw_control(exact), head.withheld
        if head.withheld.size:
            exact = exact + head.withheld
        control = coded_control(code_at(_CONTROL_NOISE, exact, self._layout))
        told = decode_control(control, self._layout)
        return direction, variates, control, exact if told is None else exact - told

    def _pace(self, step: Vector, aggregate: Vector) -> float:
        """Standard deviation of the latest steps, or of the aggregates where they are smaller, averaged.

        One odd round must not make a version much finer or coarser than those around it. Momentum makes steps larger,
        but not what clients learn in a round, which is what coding must not drown.
        """
        before = self._head.pace
        found = min(float(np.std(vector, dtype=np.float64)) for vector in (step, aggregate))
        if not (before > 0 and math.isfinite(found)):
            return found if math.isfinite(found) else before
        return before + (min(found, _OUTLIER * before) - before) / min(self._head.version + 1, _RECENT)

    def _restore(self) -> _Head:
        latest = self._ledger.latest()
        size, none = self._layout.size, np.zeros(0, np.float32)
        kept = () if self._variates is None else self._variates.init(size)
        start = self._optimizer.init(size)
        noise = self._codec.model_noise
        coder = Coder.after(CodedState(self._layout), 0, noise)
        if latest is None:
            return _Head(0, self._untrained(), none, none, kept, start, 0.0, coder)
        try:
            model = unpack_model(latest.state, self._layout)
            raw = isinstance(model.state, RawState)
            if raw != (self._codec.kind == "none"):
                raise LedgerError(
                    "the ledger was written with another codec.kind; set it back, or use a new state folder"
                )
            if isinstance(model.state, CodedState):
                coder = Coder.after(model.state, latest.version - latest.anchor, noise)
        except CodecError as error:
            raise LedgerError(
                f"version {latest.version} in the ledger cannot be read: {error}; go on with the fedge that wrote it, "
                "or use a new state folder"
            ) from error
        left = np.frombuffer(latest.remainder, "<f4").astype(np.float32)
        states = unpack(latest.optimizer, self._name, (*kept, *start))
        variates, optimizer = states[: len(kept)], states[len(kept) :]
        return _Head(latest.version, model, left[:size], left[size:], variates, optimizer, latest.pace, coder)

    def _untrained(self) -> Model:
        return untrained(self._layout, self._buffers)

    def _model(self, version: int | None) -> Model:
        if version is None or version == self._head.version:
            return self._head.model
        if version == 0:
            return self._untrained()
        stored = self._ledger.version(version)
        if stored is None or not stored.state:
            raise LedgerError(f"version {version} of the model is not in the ledger any more")
        return unpack_model(stored.state, self._layout)
