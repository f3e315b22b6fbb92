"""A bundle's graphs with their memory: what is bound to ONNX Runtime.

One run of ``train.onnx`` is one optimizer step. All its memory is bound once for a task, and a step writes the model
over the one that it read, as the graph allows (its updates wait for all readers). Per step, a batch is copied into
bound memory and the runtime called; nothing else is allocated than what the runtime needs inside a step.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client import runtime
from edge_client.bundle import EVAL, INFER, TRAIN, Bundle
from edge_client.codec.layout import Layout, Vector
from edge_client.data import fill
from edge_client.errors import BundleError, CodecError, DataError, TrainingError
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

    def run(self, feed: Feed, rows: int, *, last: bool = False) -> None:
        """Run on the first ``rows`` rows of ``feed``; the ``last`` run gives back the memory that runs need inside."""
        if self._fed != (feed, rows):
            for name, value in feed.values(rows).items():
                self.bind(name, value)
            self._fed = (feed, rows)
        runtime.run(self._session, self._raw, last=last)


class Step:
    """``train.onnx``, ready to run; the memory of a task is the task's."""

    def __init__(self, bundle: Bundle, threads: int, spin: bool) -> None:
        manifest, layout = bundle.manifest, bundle.trained
        constants = {f"param.{name}": aligned(bundle.weights[name]) for name in manifest.constants[TRAIN]}
        self.session = runtime.session(bundle.train, threads=threads, spin=spin, constants=constants)
        self.manifest, self.layout, self.shared, self.tracked = manifest, layout, bundle.layout, bundle.tracked
        # A graph may count its predictions, several of a sequence's row say; else the rows are counted.
        self.counts = "sum.count" in {value.name for value in self.session.get_outputs()}
        weights = [tensor.name for tensor in layout.tensors]
        buffers = [tensor.name for tensor in self.tracked.tensors]
        slots = [f"{slot}.{name}" for slot in manifest.optimizer.slots for name in weights]
        given = [f"hyper.{name}" for name in manifest.defaults()] + [f"slot.{name}" for name in slots]
        given += [f"anchor.{name}" for name in weights if manifest.proximal]
        given += [f"control.{name}" for name in weights if manifest.control]
        _expect(
            TRAIN,
            self.session,
            required=[*given, *(f"param.{name}" for name in weights), *_features(manifest)],
            optional=["step", "seed", *(f"param.{name}" for name in buffers)],
            results=[
                "loss",
                *(f"sum.{name}" for name in ("count", *manifest.metrics) if name != "count" or self.counts),
                *(f"next.{name}" for name in (*slots, *weights, *buffers)),
            ],
        )

    def begin(
        self,
        model: Vector,
        buffers: Vector,
        hypers: Mapping[str, float],
        *,
        control: Vector | None,
        anchor: Vector | None,
        fixed: Collection[str],
        seed: int,
    ) -> "Task":
        """A task that trains ``model`` in place, with fresh optimizer state; ``seed`` is from 0 to 2^63 - 1.

        Parameters whose names are in ``fixed`` stay as they are.

        Raises:
            CodecError: ``model`` is of another size or dtype, or cannot be written to.
        """
        self.layout.check(model)
        if not model.flags.writeable:
            raise CodecError("the model to train is read-only memory; give a copy")
        return Task(self, model, buffers, hypers, control=control, anchor=anchor, fixed=fixed, seed=seed)


class Task:
    """The memory of one task: the model, which changes in place, optimizer state, what else an update takes."""

    def __init__(
        self,
        step: Step,
        model: Vector,
        buffers: Vector,
        hypers: Mapping[str, float],
        *,
        control: Vector | None,
        anchor: Vector | None,
        fixed: Collection[str],
        seed: int,
    ) -> None:
        manifest, layout = step.manifest, step.layout
        self.loss = np.zeros((), np.float32)
        self.metrics = {name: np.zeros((), np.float32) for name in ("count", *manifest.metrics)}
        self._counts = step.counts
        self._count = np.zeros((), np.int64)
        self._buffer_layout = step.tracked
        dtypes = {p.name: p.dtype for p in manifest.parameters}
        self._buffers = {t.name: np.zeros(t.shape, dtypes[t.name]) for t in step.tracked.tensors}
        for tensor, where in self._buffer_layout.slices():
            self._buffers[tensor.name][...] = buffers[where].reshape(tensor.shape)
        inputs: dict[str, Array] = {f"hyper.{name}": np.array(value, np.float32) for name, value in hypers.items()}
        self.rate = inputs.get("hyper.lr", np.zeros((), np.float32))
        """The learning rate of the next step: may be written to between steps."""
        inputs |= {"step": self._count, "seed": np.array(seed, np.int64)}
        outputs: dict[str, Array] = {"loss": self.loss, **_prefix("sum.", self.metrics)}
        if not self._counts:
            del outputs["sum.count"]
        changing: dict[str, Array] = {**layout.views(model), **self._buffers}
        inputs |= _prefix("param.", changing)
        for slot in manifest.optimizer.slots:
            state = layout.views(np.zeros(layout.size, np.float32))
            inputs |= _prefix(f"slot.{slot}.", state)
            changing |= _prefix(f"{slot}.", state)
        own = {tensor.name for tensor in layout.tensors} - {tensor.name for tensor in step.shared.tensors}
        if manifest.proximal:
            # What never leaves the device has nothing to stay near to: it is its own anchor.
            pulling = layout.views(model.copy() if anchor is None else anchor)
            inputs |= _prefix("anchor.", pulling | {name: changing[name] for name in own})
        if manifest.control:
            # Zeros that are only read take no memory: the kernel has one page for all of them.
            pushing = layout.views(np.zeros(layout.size, np.float32))
            inputs |= _prefix("control.", pushing | ({} if control is None else step.shared.views(control)))
        self._binding = _Binding(step.session, inputs, outputs | _prefix("next.", changing | _elsewhere(layout, fixed)))

    def run(self, feed: Feed, rows: int, *, last: bool = False) -> None:
        """One step; then ``loss`` and ``metrics`` hold the batch's mean loss and sums."""
        if not self._counts:
            self.metrics["count"][...] = rows
        self._count += 1
        self._binding.run(feed, rows, last=last)

    def buffers(self) -> Vector:
        """The buffers after the last step, as a new flat float32 vector."""
        vector = np.empty(self._buffer_layout.size, np.float32)
        for tensor, where in self._buffer_layout.slices():
            vector[where] = self._buffers[tensor.name].ravel()
        return vector


class Evaluation:
    """``eval.onnx`` for one model, whose weights are constants of the session.

    A session for each model costs milliseconds and pays at once: the runtime packs constants. 10,000 images of the
    McMahan CNN take 1.82 s on one core, session included, and 3.02 s with weights as inputs.
    """

    def __init__(self, bundle: Bundle, vector: Vector, buffers: Vector, threads: int) -> None:
        manifest = bundle.manifest
        session = runtime.session(
            bundle.eval, threads=threads, constants=_constants(bundle, vector, buffers, manifest.constants[EVAL])
        )
        self.sums = {name: np.zeros((), np.float32) for name in ("loss", "count", *manifest.metrics)}
        _expect(EVAL, session, required=[], optional=_features(manifest), results=[f"sum.{name}" for name in self.sums])
        self._binding = _Binding(session, {}, _prefix("sum.", self.sums))

    def run(self, feed: Feed, rows: int, *, last: bool = False) -> None:
        """Put the sums of the first ``rows`` rows of ``feed`` into ``sums``; the ``last`` run gives memory back."""
        self._binding.run(feed, rows, last=last)


def _elsewhere(layout: Layout, names: Collection[str]) -> dict[str, Array]:
    """Memory for results that nobody wants: all of them have the same, as no other result depends on them."""
    tensors = [tensor for tensor in layout.tensors if tensor.name in names]
    waste = np.empty(max((tensor.size for tensor in tensors), default=0), np.float32)
    return {tensor.name: waste[: tensor.size].reshape(tensor.shape) for tensor in tensors}


class Inference:
    """``infer.onnx`` for one model, whose weights are constants of the session."""

    def __init__(self, bundle: Bundle, vector: Vector, buffers: Vector, threads: int) -> None:
        names = bundle.manifest.constants[INFER]
        self._inputs, self._outputs = bundle.manifest.inputs, bundle.manifest.outputs
        self._session = runtime.session(
            bundle.infer, threads=threads, constants=_constants(bundle, vector, buffers, names)
        )

    def run(self, batch: Mapping[str, object]) -> list[Array]:
        """The model's outputs for a batch, in the manifest's order, ``[rows, ...]`` each.

        Raises:
            DataError: the batch does not fit the bundle.
            TrainingError: the runtime failed, or gave what the manifest does not say.
        """
        fed = {feature.name: converted(batch, feature) for feature in self._inputs}
        rows, found = len(fed[self._inputs[0].name]), runtime.infer(self._session, fed)
        wanted = [((rows, *feature.shape), feature.dtype) for feature in self._outputs]
        if [(getattr(array, "shape", ()), str(getattr(array, "dtype", ""))) for array in found] != wanted:
            raise TrainingError(f"{INFER} gives other outputs than its manifest says; export it again")
        return found


def converted(batch: Mapping[str, object], feature: Feature) -> Array:
    """One feature of a batch as the model sees it: ``[rows, *shape]`` of the feature's dtype, new.

    Raises:
        DataError: it is missing, or does not fit.
    """
    given = batch.get(feature.name)
    rows = len(given) if isinstance(given, np.ndarray) and given.ndim else 0
    out = np.empty((rows, *feature.shape), feature.dtype)
    fill(out, given, feature)
    return out


def _constants(bundle: Bundle, vector: Vector, buffers: Vector, names: Iterable[str]) -> dict[str, Array]:
    """Of the model with these parameters and buffers, what a graph takes as constants."""
    layout = bundle.trained
    layout.check(vector)
    tensors: dict[str, Array] = dict(bundle.weights)
    tensors |= layout.views(vector)
    for tensor, where in bundle.tracked.slices():
        kind = bundle.weights[tensor.name].dtype
        tensors[tensor.name] = buffers[where].reshape(tensor.shape).astype(kind)
    return {f"param.{name}": aligned(tensors[name]) for name in names}


def aligned(array: Array) -> Array:
    """The array as operators like it: contiguous, and at an address that fits its dtype, as in a file it may not be."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "A"])


def _features(manifest: Manifest) -> list[str]:
    return [feature.name for feature in (*manifest.inputs, *manifest.targets)]


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
