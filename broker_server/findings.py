"""What clients' counts come to: confusion by class, labels, histograms of inputs.

A collection adds up whole numbers, so that no order changes a bit, and keeps nothing of single clients but in its sums.
Until the evaluation ends the server sees single ones: in memory, and in the ledger, which needs them after a crash.
"""

import contextlib
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from broker_server.analytics import report_plan, report_vectors
from broker_server.claims import Counts, believed, checked_samples, counted, scaled
from broker_server.config import Federation
from edge_client.codec.update import decode_update, max_update_bytes, vector_names
from edge_client.manifest import Manifest
from edge_client.reporting import CONFUSION, FEATURES, HELD, LABELS, LIMB, UNIT, classes
from edge_client.wire.messages import ReportPlan

FOLDER = "analytics"
NEWEST, TABLE = "newest.json", "confusion.csv"


class Histogram(msgspec.Struct, frozen=True):
    """How the values of one input, or of one of its columns (``x[3]``), are spread."""

    name: str
    low: float
    high: float
    below: int
    bins: tuple[int, ...]
    """Equal parts of the range from ``low`` to ``high``."""
    above: int
    mean: float | None
    """Of the values in the range; None where there are none."""
    deviation: float | None

    @property
    def shares(self) -> list[int]:
        """All counts, in order."""
        return [self.below, *self.bins, self.above]


class ClassResult(msgspec.Struct, frozen=True):
    """How well one class is told from the others; None where nothing was counted."""

    name: str
    samples: int
    recall: float | None
    """Of the samples of this class, the share that the model takes for it: the accuracy on the class."""
    precision: float | None
    """Of the samples that the model takes for this class, the share that are."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What one evaluation found."""

    round: int
    version: int
    """Of the model."""
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """``[classes, classes]``: rows are what samples are, columns what the model takes them for."""
    labels: tuple[int, ...] = ()
    """Samples of each class that clients train on."""
    features: tuple[Histogram, ...] = ()
    clients: dict[str, int] = {}
    """By what was asked for, how many clients told it."""
    least: int = 1
    """What fewer clients told is not kept."""

    @property
    def by_class(self) -> list[ClassResult]:
        """Each class, where there is confusion."""
        if not self.confusion:
            return []
        counts = np.array(self.confusion, np.int64)
        hits, are, said = counts.diagonal().tolist(), counts.sum(1).tolist(), counts.sum(0).tolist()
        return [
            ClassResult(name, there, _share(hit, there), _share(hit, taken))
            for name, hit, there, taken in zip(self.classes, hits, are, said, strict=False)
        ]

    def plain(self) -> dict[str, object]:
        """For JSON, with what follows from the counts."""
        return {**msgspec.to_builtins(self), "by_class": [msgspec.to_builtins(row) for row in self.by_class]}


class Collection:
    """The counts of one evaluation, summed over clients.

    Raises:
        ConfigError: the bundle has not what the settings ask for.
    """

    def __init__(self, settings: Federation, manifest: Manifest) -> None:
        self._manifest, self._plan, self._least = manifest, report_plan(settings), settings.analytics.least
        self._layouts = report_vectors(settings, manifest)
        self._count = settings.limits.count
        self._sums: dict[str, Counts] = {}
        self._clients: dict[str, int] = {}

    @property
    def limit(self) -> int:
        """Bytes of the largest update of an evaluation."""
        return max_update_bytes(self._layouts)

    def read(self, data: bytes) -> tuple[int, dict[str, float], dict[str, Counts]]:
        """Samples, scalars and counts of an update, held against its samples; a client may leave out what it is asked.

        Raises:
            CodecError: it is damaged, holds what was not asked for, or more than its samples come to.
        """
        names = vector_names(data)
        update = decode_update(data, {name: one for name, one in self._layouts.items() if name in names})
        scalars = {name: value for name, value in update.scalars.items() if math.isfinite(value)}
        samples = checked_samples(scalars.get("samples", 0.0))
        held = checked_samples(scalars.get(HELD, 0.0)) if names - {CONFUSION} else samples
        of = {name: samples if name == CONFUSION else held for name in names}
        counts = counted(update.vectors, self._layouts, of, self._manifest)
        for name in names:
            counts[name] = scaled(counts[name], self._count(of[name]) / of[name], name, self._layouts[name])
        share = self._count(samples) / samples
        return self._count(samples), believed(scalars, samples, self._manifest, share), counts

    def add(self, counts: Mapping[str, Counts]) -> None:
        """One more client's, ``[layout.size] int64`` each by name."""
        for name, found in counts.items():
            self._clients[name] = self._clients.get(name, 0) + 1
            if name in self._sums:
                self._sums[name] += found
            else:
                self._sums[name] = found.copy()

    def finish(self, round_: int, version: int) -> Findings | None:
        """What they come to, and a new start; None where nobody told anything."""
        sums, clients = self._sums, self._clients
        self._sums, self._clients = {}, {}
        if not clients:
            return None
        kept = {name: found for name, found in sums.items() if clients[name] >= self._least}
        scored = classes(self._manifest)
        confusion, labels = kept.get(CONFUSION), kept.get(LABELS)
        return Findings(
            round=round_,
            version=version,
            classes=scored.names if scored is not None and (CONFUSION in kept or LABELS in kept) else (),
            confusion=() if confusion is None else _rows(confusion, math.isqrt(confusion.size)),
            labels=() if labels is None else tuple(labels.tolist()),
            features=self._histograms(kept[FEATURES]) if FEATURES in kept else (),
            clients=clients,
            least=self._least,
        )

    def _histograms(self, counts: Counts) -> tuple[Histogram, ...]:
        found = []
        for tensor, where in self._layouts[FEATURES].slices():
            rows = counts[where].reshape(tensor.shape).tolist()
            for column, row in enumerate(rows):
                name = tensor.name if len(rows) == 1 else f"{tensor.name}[{column}]"
                found.append(_histogram(name, row, self._plan))
        return tuple(found)


def _histogram(name: str, row: Sequence[int], plan: ReportPlan) -> Histogram:
    below, *bins, above = row[:-4]
    # Python's whole numbers have no bounds.
    first, second = row[-4] * LIMB + row[-3], row[-2] * LIMB + row[-1]
    count, width = sum(bins), plan.high - plan.low
    mean = deviation = None
    if count:
        z = first / UNIT / count
        mean = plan.low + width * z
        deviation = width * math.sqrt(max(0.0, second / UNIT / count - z * z))
    return Histogram(name, plan.low, plan.high, below, tuple(bins), above, mean, deviation)


def drift(before: Sequence[int], now: Sequence[int]) -> float | None:
    """How far two distributions are apart, given as counts: from 0 for the same one to 1 (total variation distance).

    None where one of them counts nothing, or they are of different things.
    """
    if len(before) != len(now) or not sum(before) or not sum(now):
        return None
    return sum(abs(a / sum(before) - b / sum(now)) for a, b in zip(before, now, strict=True)) / 2


def write_findings(folder: Path, found: Findings) -> None:
    """Write the newest findings for other programs, below ``folder``: all of them as JSON, confusion as CSV too.

    A disk that refuses does not end a federation: the ledger has them.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder / NEWEST, msgspec.json.format(msgspec.json.encode(found.plain()), indent=2) + b"\n")
        if found.confusion:
            text = io.StringIO()
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["class", *found.classes])
            table.writerows([name, *row] for name, row in zip(found.classes, found.confusion, strict=True))
            _put(folder / TABLE, text.getvalue().encode())


def _put(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(data)
    fresh.replace(path)


def _rows(counts: Counts, width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts.reshape(-1, width).tolist())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
