"""What a recorder has recorded, as samples to train on: those whose inputs and targets are all there."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from edge_client.data import Array, Arrays, check, table_arrays
from edge_client.errors import DataError
from edge_client.feeds.ring import Packed, Record, decode, frames, segments
from edge_client.feeds.shards import MEMORY, Shard, Shards
from edge_client.manifest import Manifest

Fields = dict[str, int | float | Packed]


@dataclass
class _Segment:
    """What is known of a segment without holding its samples."""

    path: Path
    end: int = 0
    """Offset up to which it was read."""
    rows: int = 0
    """Samples begun in it; a sample's place is its number among them."""
    whole: set[int] = field(default_factory=set)
    """Places of the samples that can be trained on."""
    added: dict[int, Fields] = field(default_factory=dict)
    """What later records say of samples that were not whole, by place."""
    waiting: set[str | int] = field(default_factory=set)
    """Ids of those that still are not."""
    size: int = 0


@dataclass(frozen=True)
class _Home:
    """Where a sample lies that is not whole yet."""

    segment: _Segment
    place: int
    offset: int


class Recording:
    """The samples in the ring at ``folder``.

    A record with all inputs begins a sample. Later records add fields to the last sample of their id, until it is
    whole. A ring that is not there yet has no samples; records that fit no sample of the bundle are left out, and the
    first one is named in the log. Samples recorded longer than ``seconds`` ago are not used; 0 uses all.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        log: Callable[[str], None],
        *,
        seconds: float = 0.0,
        memory: int = MEMORY,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.shards = Shards(manifest, memory=memory)
        self._folder, self._manifest, self._log = folder, manifest, log
        self._seconds, self._wall = seconds, wall
        self._segments: dict[Path, _Segment] = {}
        self._homes: dict[str | int, _Home] = {}
        self._told: set[str] = set()
        self._columns = {
            name
            for target in manifest.targets
            for name in (target.name, *(f"{target.name}.{i}" for i in range(int(np.prod(target.shape)))))
        }

    def refresh(self) -> None:
        """Read what has been appended since the last time."""
        paths = [path for path in segments(self._folder) if not self._old(path)]
        for path in self._segments.keys() - set(paths):
            gone = self._segments.pop(path)
            for name in gone.waiting:
                if name in self._homes and self._homes[name].segment is gone:
                    del self._homes[name]
        for path in paths:
            self._scan(self._segments.setdefault(path, _Segment(path)))
        self.shards.replace(tuple(self._shard(self._segments[path]) for path in paths))

    def _old(self, path: Path) -> bool:
        """Whether all of a segment is too old: it was last written to that long ago."""
        try:
            return 0 < self._seconds < self._wall() - path.stat().st_mtime
        except FileNotFoundError:
            return True

    def _scan(self, segment: _Segment) -> None:
        try:
            with open(segment.path, "rb") as file:
                for data, end in frames(file, segment.end):
                    offset, segment.end = segment.end, end
                    record = decode(data)
                    if record is not None:
                        self._note(segment, record, offset, len(data))
        except FileNotFoundError:
            return  # it was the oldest
        except OSError as error:
            self._say("unreadable", f"{segment.path}: {error.strerror}; the client's user must be able to read it")

    def _note(self, segment: _Segment, record: Record, offset: int, size: int) -> None:
        if not self._begins(record.fields):
            self._add(record)
            return
        place, segment.rows = segment.rows, segment.rows + 1
        segment.size += size
        if self._row(record.fields) is not None:
            segment.whole.add(place)
            self._homes.pop(record.id, None)
        elif not all(self._given(record.fields)):
            segment.waiting.add(record.id)
            self._homes[record.id] = _Home(segment, place, offset)

    def _add(self, record: Record) -> None:
        home = self._homes.get(record.id)
        if home is None:
            return
        added = home.segment.added.get(home.place, {}) | record.fields
        home.segment.added[home.place] = added
        with open(home.segment.path, "rb") as file:
            data, _ = next(frames(file, home.offset), (b"", 0))
        first = decode(data)
        fields = (first.fields if first is not None else {}) | added
        if all(self._given(fields)):
            if self._row(fields) is not None:
                home.segment.whole.add(home.place)
            del self._homes[record.id]
            home.segment.waiting.discard(record.id)

    def _begins(self, fields: Fields) -> bool:
        """Whether a record holds all inputs: by name, or as columns."""
        inputs = self._manifest.inputs
        if any(feature.name in fields for feature in inputs):
            return all(feature.name in fields for feature in inputs)
        return len(inputs) == 1 and bool(fields.keys() - self._columns)

    def _given(self, fields: Fields) -> list[bool]:
        """For each target, whether it is there."""
        return [target.name in fields or f"{target.name}.0" in fields for target in self._manifest.targets]

    def _row(self, fields: Fields) -> Arrays | None:
        """A sample as arrays of one row; None while a target is missing, or where it does not fit."""
        if not all(self._given(fields)):
            return None
        try:
            if any(feature.name in fields for feature in self._manifest.inputs):
                features = (*self._manifest.inputs, *self._manifest.targets)
                row: Arrays = {feature.name: _array(fields[feature.name]) for feature in features}
            else:
                table = np.array([[_number(name, value) for name, value in fields.items()]])
                row = table_arrays(self._folder, list(fields), table, self._manifest)
            check(row, self._manifest)
        except (DataError, ValueError, TypeError, KeyError) as error:
            self._say("record", f"left out a record of {self._folder}: {error} (further ones are not named)")
            return None
        return row

    def _shard(self, segment: _Segment) -> Shard:
        places = np.array(sorted(segment.whole), np.int64)
        load = partial(self._load, segment.path, frozenset(segment.whole), dict(segment.added), segment.end)
        # A sample becomes whole once, and never changes after: their number tells one content from another.
        return Shard(segment.path.name, len(places), places, segment.size, load)

    def _load(self, path: Path, places: frozenset[int], added: dict[int, Fields], end: int) -> Arrays:
        rows: list[Arrays] = []
        place = 0
        try:
            with open(path, "rb") as file:
                for data, at in frames(file, 0):
                    record = decode(data)
                    if at > end:
                        break
                    if record is None or not self._begins(record.fields):
                        continue
                    if place in places and (row := self._row(record.fields | added.get(place, {}))) is not None:
                        rows.append(row)
                    place += 1
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; it was the oldest of its ring") from error
        if len(rows) != len(places):
            raise DataError(f"{path}: {len(rows)} samples where {len(places)} were; its medium loses data")
        if not rows:
            raise DataError(f"{path}: no samples yet")
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def _say(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._log(line)


def _array(value: int | float | Packed) -> Array:
    """One row.

    Raises:
        ValueError: shape, dtype and bytes do not fit each other.
        TypeError: there is no such dtype.
    """
    if not isinstance(value, Packed):
        return np.array([value])
    if np.dtype(value.dtype).kind not in "biuf":
        raise TypeError(f"dtype {value.dtype!r}; expected numbers")
    return np.frombuffer(value.data, value.dtype).reshape(1, *value.shape)


def _number(name: str, value: int | float | Packed) -> float:
    if isinstance(value, Packed):
        raise DataError(f"{name!r} is an array; expected a number in each column, or the inputs by name")
    return float(value)
