"""A bundle's graphs with their memory: what is bound to ONNX Runtime, and how it takes turns.

One run of ``train.onnx`` is one optimizer step. All its memory is bound once: a step reads one copy of the model and
writes the other, and the next step the other way round. (Reading and writing one copy works in most cases, but nothing
in the runtime promises that every reader of a weight runs before its update.) Per step, a batch is copied into bound
memory and the runtime called; nothing is allocated.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client import runtime
from edge_client.bundle import EVAL, TRAIN, Bundle
from edge_client.codec.layout import Vector
from edge_client.data import fill
from edge_client.errors import BundleError, DataError
from edge_client.manifest import Feature, Manifest

Array = npt.NDArray[np.generic]


class Feed:
    """Memory for one batch of at most ``capacity`` rows, shared with the runtime."""

    def __init__(self, features: tuple[Feature, ...], capacity: int) -> None:
        self._features = features
        self._capacity = capacity
        self._memory = {f.name: np.zeros((capacity, *f.shape), f.dtype) for f in features}
        self._views: dict[int, dict[str, Array]] = {}
        self._values: dict[int, dict[str, Any]] = {}

    def take(self, batch: Mapping[str, object]) -> int:
        """Copy a batch in and return its number of rows."""
        first = batch.get(self._features[0].name)
        rows = len(first) if isinstance(first, np.ndarray) and first.ndim else 0
        if not 0 < rows <= self._capacity:
            raise DataError(
                f"a batch has {rows} rows of {self._features[0].name!r}; expected 1 to {self._capacity}; "
                "repair the data source"
            )
        views = self._views.get(rows) or self._views.setdefault(
            rows, {name: memory[:rows] for name, memory in self._memory.items()}
        )
        for feature in self._features:
            fill(views[feature.name], batch.get(feature.name), feature)
        return rows

    def values(self, rows: int) -> dict[str, Any]:
        """The first ``rows`` rows as OrtValues, by name."""
        if rows not in self._values:
            self._values[rows] = {name: runtime.shared(memory[:rows]) for name, memory in self._memory.items()}
        return self._values[rows]


class _Binding:
    """An IOBinding that keeps alive what is bound to it."""

    def __init__(self, session: Any, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._session = session
        self._raw = session.io_binding()
        self._names = {value.name for value in session.get_inputs()}
        self._kept: dict[str, Any] = {}
        self._fed: tuple[Feed | None, int] = (None, 0)
        for name, array in inputs.items():
            self.bind(name, runtime.shared(array))
        for name, array in outputs.items():
            self._kept["> " + name] = value = runtime.shared(array)
            self._raw.bind_ortvalue_output(name, value)

    def bind(self, name: str, value: Any) -> None:
        """Bind an input; one that the graph does not have is left out."""
        if name in self._names:
            self._kept[name] = value
            self._raw.bind_ortvalue_input(name, value)

    def run(self, feed: Feed, rows: int) -> None:
        """Run on the first ``rows`` rows of ``feed``."""
        if self._fed != (feed, rows):
            for name, value in feed.values(rows).items():
                self.bind(name, value)
            self._fed = (feed, rows)
        runtime.run(self._session, self._raw)


class Step:
    """``train.onnx`` and its memory: two models that take turns, optimizer state, what else an update takes."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        manifest, layout = bundle.manifest, bundle.layout
        names = manifest.constants[TRAIN]
        session = runtime.session(
            bundle.train, threads=threads, constants={f"param.{n}": aligned(bundle.weights[n]) for n in names}
        )
        self._layout, self._buffer_layout = layout, manifest.layout("buffer")
        self._models = [np.zeros(layout.size, np.float32) for _ in range(2)]
        self._buffers = [_zeros(manifest) for _ in range(2)]
        self._slots = {slot: np.zeros(layout.size, np.float32) for slot in manifest.optimizer.slots}
        self._anchor = np.zeros(layout.size if manifest.proximal else 0, np.float32)
        self._control = np.zeros(layout.size if manifest.control else 0, np.float32)
        self._count, self._seed = np.zeros((), np.int64), np.zeros((), np.int64)
        self._hypers = {name: np.zeros((), np.float32) for name in manifest.defaults()}
        self.loss = np.zeros((), np.float32)
        self.metrics = {name: np.zeros((), np.float32) for name in ("count", *manifest.metrics)}
        # A graph may count its predictions, several of a sequence's row say; else the rows are counted.
        self._counts = "sum.count" in {value.name for value in session.get_outputs()}
        self._now = 0

        given: dict[str, Array] = {f"hyper.{name}": value for name, value in self._hypers.items()}
        slots_out: dict[str, Array] = {}
        for slot, state in self._slots.items():
            # One elementwise operator reads the old state and writes the new, so that both may be the same memory.
            given |= {f"slot.{slot}.{name}": view for name, view in layout.views(state).items()}
            slots_out |= {f"next.{slot}.{name}": view for name, view in layout.views(state).items()}
        if manifest.proximal:
            given |= {f"anchor.{name}": view for name, view in layout.views(self._anchor).items()}
        if manifest.control:
            given |= {f"control.{name}": view for name, view in layout.views(self._control).items()}
        counters: dict[str, Array] = {"step": self._count, "seed": self._seed}
        results = {"loss": self.loss, **_prefix("sum.", self.metrics)}
        if not self._counts:
            del results["sum.count"]
        models = [layout.views(model) for model in self._models]
        _expect(
            "train.onnx",
            session,
            required=[*given, *(f"param.{t.name}" for t in layout.tensors), *_features(manifest)],
            optional=[*counters, *(f"param.{name}" for name in self._buffers[0])],
            results=[*results, *slots_out, *(f"next.{n}" for n in (*models[0], *self._buffers[0]))],
        )
        self._bindings = [
            _Binding(
                session,
                {**given, **counters, **_prefix("param.", models[old] | self._buffers[old])},
                {**results, **slots_out, **_prefix("next.", models[1 - old] | self._buffers[1 - old])},
            )
            for old in range(2)
        ]

    def begin(
        self, received: Vector, buffers: Vector, hypers: Mapping[str, float], *, control: Vector | None, seed: int
    ) -> None:
        """Start from ``received``, with fresh optimizer state; ``seed`` is from 0 to 2^63 - 1."""
        self._layout.check(received)
        self._now = 0
        self._count[...], self._seed[...] = 0, seed
        self._control[:] = 0 if control is None else control
        self._models[0][:] = received
        if self._anchor.size:
            self._anchor[:] = received
        for state in self._slots.values():
            state.fill(0)
        for tensor, where in self._buffer_layout.slices():
            self._buffers[0][tensor.name][...] = buffers[where].reshape(tensor.shape)
        for name, value in hypers.items():
            self._hypers[name][...] = value

    def run(self, feed: Feed, rows: int) -> None:
        """One step; the two models change roles, and ``loss`` and ``metrics`` hold the batch's mean loss and sums."""
        if not self._counts:
            self.metrics["count"][...] = rows
        self._count += 1
        self._bindings[self._now].run(feed, rows)
        self._now = 1 - self._now

    def model(self) -> Vector:
        """The model after the last step: memory that the next run overwrites."""
        return self._models[self._now]

    def buffers(self) -> Vector:
        """The buffers after the last step, as a new flat float32 vector."""
        vector = np.empty(self._buffer_layout.size, np.float32)
        for tensor, where in self._buffer_layout.slices():
            vector[where] = self._buffers[self._now][tensor.name].ravel()
        return vector


class Evaluation:
    """``eval.onnx`` for one model, whose weights are constants of the session.

    A session for each model costs milliseconds and pays at once: the runtime packs constants. 10,000 images of the
    McMahan CNN take 1.82 s on one core, session included, and 3.02 s with weights as inputs.
    """

    def __init__(self, bundle: Bundle, vector: Vector, buffers: Vector, threads: int) -> None:
        manifest, layout = bundle.manifest, bundle.layout
        layout.check(vector)
        tensors: dict[str, Array] = dict(bundle.weights)
        tensors |= layout.views(vector)
        for tensor, where in manifest.layout("buffer").slices():
            kind = bundle.weights[tensor.name].dtype
            tensors[tensor.name] = buffers[where].reshape(tensor.shape).astype(kind)
        session = runtime.session(
            bundle.eval,
            threads=threads,
            constants={f"param.{n}": aligned(tensors[n]) for n in manifest.constants[EVAL]},
        )
        self.sums = {name: np.zeros((), np.float32) for name in ("loss", "count", *manifest.metrics)}
        _expect(EVAL, session, required=[], optional=_features(manifest), results=[f"sum.{name}" for name in self.sums])
        self._binding = _Binding(session, {}, _prefix("sum.", self.sums))

    def run(self, feed: Feed, rows: int) -> None:
        """Put the sums of the first ``rows`` rows of ``feed`` into ``sums``."""
        self._binding.run(feed, rows)


def aligned(array: Array) -> Array:
    """The array as operators like it: contiguous, and at an address that fits its dtype, as in a file it may not be."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A"])


def _features(manifest: Manifest) -> list[str]:
    return [feature.name for feature in (*manifest.inputs, *manifest.targets)]


def _zeros(manifest: Manifest) -> dict[str, Array]:
    return {p.name: np.zeros(p.shape, p.dtype) for p in manifest.parameters if p.role == "buffer"}


def _prefix(prefix: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {prefix + name: array for name, array in arrays.items()}


def _expect(graph: str, session: Any, *, required: Iterable[str], optional: Iterable[str], results: list[str]) -> None:
    """Check a graph's inputs and outputs against what the manifest makes them."""
    inputs = {value.name for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    needed = set(required)
    for what, names in {
        "lacks input": needed - inputs,
        "has the unknown input": inputs - needed - set(optional),
        "lacks output": set(results) - outputs,
        "has the unknown output": outputs - set(results),
    }.items():
        if names:
            raise BundleError(f"{graph} {what} {min(names)!r}, which its manifest calls for otherwise; export it again")
