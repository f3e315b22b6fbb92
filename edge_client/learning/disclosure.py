"""What a device tells of its data in an evaluation: only what it was asked for, and of that what its owner lets it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

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


class Told(NamedTuple):
    """What a device tells of its data."""

    vectors: dict[str, Vector]
    """By name, as `edge_client.reporting` lays them out."""
    tested: int
    """Most samples that counts of the test data are of."""
    held: int
    """Most samples that counts of the training data are of."""


def told(task: Assignment, parameters: Vector, buffers: Vector) -> Told:
    """The vectors of an evaluation's update.

    Args:
        task: the task; its plan asks, and its ``shares`` say what is told.
        parameters: of the model that is evaluated, ``[trained.size] float32``.
        buffers: its buffers, ``[tracked.size] float32``.

    Raises:
        DataError: the data does not fit the bundle.
        TrainingError: the task was stopped, or the runtime failed.
    """
    manifest, plan, found = task.bundle.manifest, task.plan.report, dict[str, Vector]()
    tested = held = rows = 0
    for name, layout in report_layouts(manifest, plan).items():
        if name not in task.shares:
            continue
        if name == CONFUSION:
            found[name], tested = _confusion(task, parameters, buffers)
        elif name == LABELS:
            found[name], rows = _labels(manifest, _batches(task.train, task.stop))
        elif name == FEATURES:
            found[name], rows = _features(manifest, plan, layout, _batches(task.train, task.stop))
        held = max(held, rows)
    return Told(found, tested, held)


def _flat(counts: Counts) -> Vector:
    return counts.ravel().astype(np.float32)


def _batches(source: DataSource, stop: Callable[[], bool]) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    for batch in source.batches(_BATCH, seed=None):
        if stop():
            raise TrainingError("stopped: the server has moved on")
        yield batch


def _confusion(task: Assignment, parameters: Vector, buffers: Vector) -> tuple[Vector, int]:
    """``[classes, classes]``, flat: the classes of the test data by those that the model scores highest; of how many
    samples."""
    scored = classes(task.bundle.manifest)
    assert scored is not None
    counts, rows = np.zeros((scored.count, scored.count), np.int64), 0
    for batch, (scores, *_) in task.trainer.predict(parameters, task.test, buffers=buffers):
        if task.stop():
            raise TrainingError("stopped: the server has moved on")
        wanted = converted(batch, task.bundle.manifest.targets[0]).ravel().astype(np.int64)
        chosen = scores.argmax(scored.axis).ravel()
        known = (wanted >= 0) & (wanted < scored.count)
        places = wanted[known] * scored.count + chosen[known]
        counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
        rows += len(scores)
    return _flat(counts), rows


def _labels(manifest: Manifest, batches: Iterator[dict[str, npt.NDArray[np.generic]]]) -> tuple[Vector, int]:
    scored = classes(manifest)
    assert scored is not None
    counts, rows = np.zeros(scored.count, np.int64), 0
    for batch in batches:
        given = converted(batch, manifest.targets[0])
        rows += len(given)
        labels = given.ravel().astype(np.int64)
        known = labels[(labels >= 0) & (labels < scored.count)]
        counts += np.bincount(known, minlength=scored.count)
    return _flat(counts), rows


def _features(
    manifest: Manifest, plan: ReportPlan, layout: Layout, batches: Iterator[dict[str, npt.NDArray[np.generic]]]
) -> tuple[Vector, int]:
    histograms, rows = [_Histogram(feature, plan) for feature in floats(manifest)], 0
    for batch in batches:
        given = [converted(batch, histogram.feature) for histogram in histograms]
        rows += len(given[0])
        for histogram, values in zip(histograms, given, strict=True):
            histogram.add(values)
    return layout.flatten({histogram.feature.name: histogram.told() for histogram in histograms}), rows


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
