"""Training with stock ONNX Runtime: parameters stay in place, batches go in."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.course import Clock, Course
from edge_client.data import Array, DataSource
from edge_client.errors import BundleError, DataError, TrainingError
from edge_client.graphs import Evaluation, Feed, Inference, Step
from edge_client.wire.messages import TrainPlan


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What came of a training run."""

    local: Vector
    """The trained model: the ``[trained.size] float32`` vector that was given, not checked for NaN."""
    buffers: Vector
    """The buffers after training, flat in the manifest's order, as float32 whatever their dtype; may be empty."""
    samples: int
    """Different samples that the run saw."""
    steps: int
    distance: float
    """Sum of the learning rates of these steps."""
    epochs: int
    """Epochs that the run began."""
    seconds: float
    loss: float
    """Mean over what the last epoch counted, each at the weights of its step; NaN where nothing was trained."""
    metrics: dict[str, float]
    """Sums over the last epoch: ``loss``, ``count`` (of predictions) and the manifest's metrics."""
    finished: bool
    """False where ``stop`` ended the run before its plan did."""


class Epoch(NamedTuple):
    """Where a training run is after an epoch, or at its end."""

    model: Vector
    """As it is now: the vector that is trained, to be read and not kept."""
    buffers: Vector
    steps: int
    distance: float


class Trainer:
    """Trains and evaluates one bundle. One thread at a time may use it; trainers in different threads run in parallel.

    The session that trains is made when first needed, one that evaluates for each model. ``threads`` is the number of
    threads inside one operator; with ``spin`` they stay awake for the length of a step. ``clock`` counts seconds.

    Raises:
        BundleError: the bundle asks for a newer onnxruntime, or its graphs do not fit its manifest (on first use).
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 1, spin: bool = False, clock: Clock = time.perf_counter
    ) -> None:
        manifest = bundle.manifest
        if not runtime.at_least(manifest.least_runtime):
            raise BundleError(
                f"bundle {manifest.name!r} needs onnxruntime {manifest.least_runtime}, {runtime.VERSION} is installed; "
                "run `pip install --upgrade onnxruntime`"
            )
        self.bundle = bundle
        self._threads = threads
        self._spin = spin
        self._clock = clock
        self._feeds: dict[int, Feed] = {}

    @cached_property
    def _step(self) -> Step:
        return Step(self.bundle, self._threads, self._spin)

    def train(
        self,
        model: Vector,
        source: DataSource,
        plan: TrainPlan,
        *,
        seed: int,
        stop: Callable[[], bool] | None = None,
        buffers: Vector | None = None,
        control: Vector | None = None,
        after: Callable[[Epoch], bool] | None = None,
        anchor: Vector | None = None,
        fixed: Collection[str] = (),
    ) -> TrainResult:
        """Train ``model`` in place as ``plan`` says; the optimizer's state starts at zero.

        Args:
            model: ``[trained.size] float32``.
            source: the data; epoch ``e`` is shuffled by ``seed`` and ``e``, so equal seeds see equal batches.
            plan: epochs, steps or seconds, batch size, hyperparameters, schedule of the learning rate.
            seed: at least 0; it also seeds what is random in the graph, such as dropout.
            stop: asked before each step; True ends the run there.
            buffers: ``[tracked.size] float32``; the bundle's own when not given.
            control: ``[layout.size] float32``, added to every gradient where the bundle has control variates (c - c_i
                of SCAFFOLD); zeros when not given. Nothing is added to those of personal parameters.
            anchor: ``[trained.size] float32``, what the proximal term pulls to where the bundle has one: ``model`` as
                it is given, unless there is another. It does not pull at personal parameters.
            fixed: names of parameters that stay as they are. Buffers change all the same, and the gradients of fixed
                parameters count in the norm that ``max_norm`` bounds.
            after: told of each epoch, and of the end where that is within one; True ends the run.

        Raises:
            CodecError: ``model``, ``buffers``, ``control`` or ``anchor`` is of another size or dtype, or ``model`` is
                read-only.
            DataError: the source is empty, or a batch does not fit the bundle.
            TrainingError: control variates for a bundle without them, an unknown or non-finite hyperparameter, or
                the runtime failed. A diverged run is no error: its loss or weights are NaN or infinite, and the server
                refuses them.
        """
        hypers = self._hypers(plan)
        if source.samples < 1:
            raise DataError("the data source is empty; training needs at least one sample")
        if control is not None:
            self._check_control(control)
        feed = self._feed(plan.batch_size)
        task = self._step.begin(
            model,
            self._buffers(buffers),
            hypers,
            control=control,
            anchor=anchor,
            fixed=fixed,
            seed=_graph_seed(seed),
        )
        course, rate = Course.of(plan, source.samples, self._clock), task.rate.item()
        steps, seen, finished, distance = 0, 0, False, 0.0
        sums = dict.fromkeys(("loss", *task.metrics), 0.0)
        for epoch in itertools.count():
            before, stopped = steps, False
            final = plan.steps == 0 and epoch + 1 == plan.epochs
            for rows, more in _taken(feed, source.batches(plan.batch_size, seed=_epoch_seed(seed, epoch))):
                if stopped := stop is not None and stop():
                    break
                if steps == before:
                    sums = dict.fromkeys(sums, 0.0)
                task.rate[...] = rate * course.factor(steps)
                distance += task.rate.item()
                # Whoever is told of an epoch may need the memory to evaluate it.
                last = steps + 1 == plan.steps or course.closing(steps)
                last |= (final or after is not None) and not more
                task.run(feed, rows, last=last)
                for name, value in task.metrics.items():
                    sums[name] += value.item()
                # The graph's loss is a mean, and the last batch may be smaller.
                sums["loss"] += task.loss.item() * task.metrics["count"].item()
                steps += 1
                seen += rows
                if finished := steps == plan.steps or course.over():
                    break
            if stopped:
                break
            if steps == before:
                raise DataError(f"the data source claims {source.samples} samples and gave no batch; repair it")
            finished |= final
            if after is not None:
                finished |= after(Epoch(model, task.buffers(), steps, distance))
            if finished:
                break
        return TrainResult(
            local=model,
            buffers=task.buffers(),
            samples=min(seen, source.samples),
            steps=steps,
            distance=distance,
            epochs=epoch + 1,
            seconds=course.elapsed(),
            loss=sums["loss"] / sums["count"] if sums["count"] else math.nan,
            metrics=sums,
            finished=finished,
        )

    def evaluate(
        self, vector: Vector, source: DataSource, *, batch_size: int = 64, buffers: Vector | None = None
    ) -> dict[str, float]:
        """Sums over all samples of ``source``: ``loss``, ``count`` and the manifest's metrics, added in float64.

        ``vector`` is ``[trained.size] float32`` and is only read; ``buffers`` as in :meth:`train`.

        Raises:
            CodecError: ``vector`` or ``buffers`` is of another size or dtype.
            DataError: a batch does not fit the bundle.
            TrainingError: the runtime failed.
        """
        evaluation = Evaluation(self.bundle, vector, self._buffers(buffers), self._threads)
        feed = self._feed(batch_size)
        sums = dict.fromkeys(evaluation.sums, 0.0)
        for rows, more in _taken(feed, source.batches(batch_size, seed=None)):
            evaluation.run(feed, rows, last=not more)
            for name, value in evaluation.sums.items():
                sums[name] += value.item()
        return sums

    def predict(
        self, vector: Vector, source: DataSource, *, batch_size: int = 64, buffers: Vector | None = None
    ) -> Iterator[tuple[Mapping[str, Array], list[Array]]]:
        """Each batch of ``source`` as it comes, with the model's outputs for it; arguments and errors as `evaluate`."""
        inference = Inference(self.bundle, vector, self._buffers(buffers), self._threads)
        for batch in source.batches(batch_size, seed=None):
            yield batch, inference.run(batch)

    def _hypers(self, plan: TrainPlan) -> dict[str, float]:
        known = self.bundle.manifest.defaults()
        for name, value in plan.hypers.items():
            if name not in known:
                raise TrainingError(
                    f"hyperparameter {name!r} is unknown to bundle {self.bundle.manifest.name!r}; "
                    f"it has {', '.join(sorted(known))}"
                )
            if not math.isfinite(value):
                raise TrainingError(f"hyperparameter {name!r} is {value}; expected a finite number")
        return known | plan.hypers

    def _check_control(self, control: Vector) -> None:
        if not self.bundle.manifest.control:
            raise TrainingError(
                f"bundle {self.bundle.manifest.name!r} takes no control variates; export it with --control"
            )
        self.bundle.layout.check(control)

    def _buffers(self, buffers: Vector | None) -> Vector:
        if buffers is None:
            return self.bundle.first(self.bundle.tracked)
        self.bundle.tracked.check(buffers)
        return buffers

    def _feed(self, capacity: int) -> Feed:
        if capacity not in self._feeds:
            # Two sizes are in use, one to train and one to evaluate; memory for others is given back.
            if len(self._feeds) > 1:
                self._feeds.clear()
            manifest = self.bundle.manifest
            self._feeds[capacity] = Feed((*manifest.inputs, *manifest.targets), capacity)
        return self._feeds[capacity]


def _taken(feed: Feed, batches: Iterable[Mapping[str, object]]) -> Iterator[tuple[int, bool]]:
    """Copy batch after batch into ``feed``: its number of rows, and whether there are more batches."""
    left = iter(batches)
    batch = next(left, None)
    while batch is not None:
        rows = feed.take(batch)
        batch = next(left, None)
        yield rows, batch is not None


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def _graph_seed(seed: int) -> int:
    """31 bits: what a counter hash in the graph takes, in any integer it may work with."""
    return int(np.random.SeedSequence((seed,)).generate_state(1, np.uint32)[0] >> 1)
