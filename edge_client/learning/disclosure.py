"""What a device tells of its data in an evaluation: only what it was asked for, and of that what its owner lets it."""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from edge_client.codec.layout import Layout, Vector
from edge_client.data import DataSource
from edge_client.errors import TrainingError
from edge_client.graphs import converted
from edge_client.learning.assignment import Assignment
from edge_client.manifest import Feature, Manifest
from edge_client.reporting import (
    CONFUSION,
    FEATURES,
    LABELS,
    LIMB,
    UNIT,
    classes,
    columns,
    floats,
    report_layouts,
)
from edge_client.wire.messages import ReportPlan

Counts = npt.NDArray[np.int64]
_BATCH = 256
"""Samples counted at once, where no model needs memory for them."""


def told(task: Assignment, parameters: Vector, buffers: Vector) -> dict[str, Vector]:
    """The vectors of an evaluation's update, by name, as `edge_client.reporting` lays them out.

    Args:
        task: the task; its plan asks, and its ``shares`` say what is told.
        parameters: of the model that is evaluated, ``[layout.size] float32``.
        buffers: its buffers, flat float32.

    Raises:
        DataError: the data does not fit the bundle.
        TrainingError: the task was stopped, or the runtime failed.
    """
    manifest, plan, found = task.bundle.manifest, task.plan.report, dict[str, Vector]()
    for name, layout in report_layouts(manifest, plan).items():
        if name not in task.shares:
            continue
        if name == CONFUSION:
            found[name] = _flat(_confusion(task, parameters, buffers))
        elif name == LABELS:
            found[name] = _flat(_labels(manifest, _batches(task.train, task.stop)))
        elif name == FEATURES:
            found[name] = _features(manifest, plan, layout, _batches(task.train, task.stop))
    return found


def _flat(counts: Counts) -> Vector:
    return counts.ravel().astype(np.float32)


def _batches(source: DataSource, stop: Callable[[], bool]) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    for batch in source.batches(_BATCH, seed=None):
        if stop():
            raise TrainingError("stopped: the server has moved on")
        yield batch


def _confusion(task: Assignment, parameters: Vector, buffers: Vector) -> Counts:
    """``[classes, classes]``, the classes of the test data by those that the model scores highest."""
    scored = classes(task.bundle.manifest)
    assert scored is not None
    counts = np.zeros((scored.count, scored.count), np.int64)
    for batch, (scores, *_) in task.trainer.predict(parameters, task.test, buffers=buffers):
        if task.stop():
            raise TrainingError("stopped: the server has moved on")
        wanted = converted(batch, task.bundle.manifest.targets[0]).ravel().astype(np.int64)
        chosen = scores.argmax(scored.axis).ravel()
        known = (wanted >= 0) & (wanted < scored.count)
        places = wanted[known] * scored.count + chosen[known]
        counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
    return counts


def _labels(manifest: Manifest, batches: Iterator[dict[str, npt.NDArray[np.generic]]]) -> Counts:
    scored = classes(manifest)
    assert scored is not None
    counts = np.zeros(scored.count, np.int64)
    for batch in batches:
        labels = converted(batch, manifest.targets[0]).ravel().astype(np.int64)
        known = labels[(labels >= 0) & (labels < scored.count)]
        counts += np.bincount(known, minlength=scored.count)
    return counts


def _features(
    manifest: Manifest, plan: ReportPlan, layout: Layout, batches: Iterator[dict[str, npt.NDArray[np.generic]]]
) -> Vector:
    histograms = [_Histogram(feature, plan) for feature in floats(manifest)]
    for batch in batches:
        for histogram in histograms:
            histogram.add(converted(batch, histogram.feature))
    return layout.flatten({histogram.feature.name: histogram.told() for histogram in histograms})


class _Histogram:
    """How the values of one input are spread over the bins."""

    def __init__(self, feature: Feature, plan: ReportPlan) -> None:
        self.feature = feature
        self._bins, self._low, self._width = plan.bins, plan.low, plan.high - plan.low
        self._columns = columns(feature)
        self._counts = np.zeros((self._columns, plan.bins + 2), np.int64)
        self._sums = np.zeros((2, self._columns))

    def add(self, values: npt.NDArray[np.generic]) -> None:
        """Count a batch, ``[rows, *shape] float32``; what is not finite is not counted."""
        with np.errstate(all="ignore"):
            z = (values.reshape(-1, self._columns).astype(np.float64) - self._low) / self._width
            places = np.clip(np.floor(z * self._bins), -1, self._bins)
        inside = (z >= 0) & (z <= 1)
        places[inside & (places == self._bins)] -= 1  # the upper end of the range belongs to it
        finite = np.isfinite(z)
        bins = self._bins + 2
        index = np.where(finite, places, 0).astype(np.int64) + 1 + np.arange(self._columns) * bins
        self._counts += np.bincount(index[finite], minlength=self._counts.size).reshape(self._counts.shape)
        kept = np.where(inside, z, 0.0)
        self._sums += kept.sum(0), np.square(kept).sum(0)

    def told(self) -> npt.NDArray[np.float32]:
        """``[columns, bins + 6]``: the counts, then the sums in units, in two parts each."""
        units = np.rint(self._sums * UNIT).astype(np.int64)
        moments = np.stack([part for whole in units for part in (whole // LIMB, whole % LIMB)], axis=1)
        return np.concatenate([self._counts, moments], axis=1).astype(np.float32)
