"""Samples in many files: a data source that holds a few of them in memory at a time, and may change between passes."""

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edge_client.data import Array, Arrays, fill
from edge_client.errors import DataError
from edge_client.manifest import Feature, Manifest

Part = Literal["train", "test"]
MEMORY = 32 << 20
"""Bytes of samples that a source has in memory at a time, unless it is told."""


@dataclass(frozen=True)
class Shard:
    """Some samples that are read together."""

    name: str
    version: object
    """Differs where the content does."""
    places: npt.NDArray[np.int64]
    """``[rows]``: each row's number within the shard, which stays its own when rows are added or completed."""
    size: int
    """Bytes in memory, about."""
    load: Callable[[], Arrays]
    """Its rows, in the order of ``places``.

    Raises:
        DataError: it is gone.
    """


class Shards:
    """The samples of a changing set of shards, held by `ShardSource`.

    A pass goes over the shards in an order drawn by its seed, as many at a time as fit into ``memory`` bytes, and
    shuffles the rows of those; shards that all fit are read once. A shard larger than that is read as a whole.
    """

    def __init__(self, manifest: Manifest, *, memory: int = MEMORY) -> None:
        self._features = (*manifest.inputs, *manifest.targets)
        self._memory = memory
        self._shards: tuple[Shard, ...] = ()
        self._cache: dict[str, tuple[object, Arrays]] = {}
        self._lock = threading.Lock()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What there is now."""
        return self._shards

    def replace(self, shards: tuple[Shard, ...]) -> None:
        """These are the shards from the next pass on; a pass under way keeps those that it began with."""
        with self._lock:
            versions = {shard.name: shard.version for shard in shards}
            self._cache = {
                name: kept for name, kept in self._cache.items() if name in versions and versions[name] == kept[0]
            }
            self._shards = shards

    def keep(self, shard: Shard, arrays: Arrays) -> None:
        """Remember what a shard holds, if there is room."""
        with self._lock:
            held = sum(_bytes(kept) for _, kept in self._cache.values())
            if held + _bytes(arrays) <= self._memory:
                self._cache[shard.name] = (shard.version, arrays)

    def groups(self, order: list[int], shards: tuple[Shard, ...]) -> Iterator[list[tuple[Shard, Arrays]]]:
        """The shards in that order, as many at a time as memory allows; those that are gone are left out."""
        group: list[tuple[Shard, Arrays]] = []
        size = 0
        for index in order:
            shard = shards[index]
            if group and size + shard.size > self._memory:
                yield group
                group, size = [], 0
            try:
                group.append((shard, self._load(shard)))
            except DataError:
                continue
            size += shard.size
        if group:
            yield group

    def join(self, parts: list[Arrays]) -> dict[str, Array]:
        """Rows of several shards one after the other; where their dtypes differ, as the bundle's features have them."""
        joined: dict[str, Array] = {}
        for feature in self._features:
            arrays = [part[feature.name] for part in parts]
            if len({array.dtype for array in arrays}) > 1:
                arrays = [_filled(array, feature) for array in arrays]
            joined[feature.name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined

    def _load(self, shard: Shard) -> Arrays:
        with self._lock:
            kept = self._cache.get(shard.name)
        if kept is not None and kept[0] == shard.version:
            return kept[1]
        arrays = shard.load()
        self.keep(shard, arrays)
        return arrays


class ShardSource:
    """A `DataSource` over `Shards`: all rows, or the part of them that is trained on or evaluated on.

    Which part a row is of follows from its shard's name and its place in it, so that a row stays in its part.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        part: Part = "train",
        holdout: float = 0.0,
        aside: tuple[float, bool] | None = None,
    ) -> None:
        self._shards = shards
        self._part = part
        self._holdout = holdout
        self._aside = aside
        """The share of the part that is kept aside, and whether this is what is kept, or what is left."""

    def apart(self, share: float) -> tuple["ShardSource", "ShardSource | None"]:
        """See `edge_client.data.Splittable`; each row is kept aside with that probability, for good."""
        left, kept = (
            ShardSource(self._shards, part=self._part, holdout=self._holdout, aside=(share, which))
            for which in (False, True)
        )
        return (left, kept) if left.samples and kept.samples else (self, None)

    @property
    def samples(self) -> int:
        """Number of samples now; may be none."""
        return sum(int(self._mine(shard).sum()) for shard in self._shards.shards)

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Array]]:
        """One pass over the samples that there are when it begins; see `DataSource`."""
        shards = self._shards.shards
        rng = None if seed is None else np.random.default_rng(seed)
        order = list(range(len(shards))) if rng is None else [int(index) for index in rng.permutation(len(shards))]
        left: dict[str, Array] | None = None
        for group in self._shards.groups(order, shards):
            rows = np.concatenate([self._mine(shard) for shard, _ in group]).nonzero()[0]
            joined = self._shards.join([arrays for _, arrays in group])
            if rng is not None:
                rows = rng.permutation(rows)
            # What did not fill a batch starts the next one: only the last of a pass may be smaller.
            ahead = 0 if left is None else len(next(iter(left.values())))
            start = min(len(rows), (size - ahead) if left is not None else 0)
            if left is not None:
                left = self._shards.join([left, _taken(joined, rows[:start])])
                if ahead + start < size:
                    continue
                yield left
                left = None
            whole = start + (len(rows) - start) // size * size
            for begin in range(start, whole, size):
                yield _taken(joined, rows[begin : begin + size])
            if whole < len(rows):
                left = _taken(joined, rows[whole:])
        if left is not None:
            yield left

    def _mine(self, shard: Shard) -> npt.NDArray[np.bool_]:
        mine = np.ones(len(shard.places), np.bool_)
        if not len(shard.places):
            return mine
        if self._holdout:
            mine &= _drawn(shard, self._holdout, "") == (self._part == "test")
        if self._aside:
            share, which = self._aside
            mine &= _drawn(shard, share, "aside/") == which
        return mine


class Feed(Protocol):
    """Data that goes on coming."""

    @property
    def shards(self) -> Shards:
        """The samples."""

    def refresh(self) -> None:
        """Look for what is new; one call at a time, on any thread."""


def _drawn(shard: Shard, share: float, purpose: str) -> npt.NDArray[np.bool_]:
    """``[rows]``: whether a row is among a ``share`` of the rows, as its shard's name and its place in it say."""
    rng = np.random.default_rng(zlib.crc32((purpose + shard.name).encode()))
    drawn: npt.NDArray[np.bool_] = rng.random(int(shard.places[-1]) + 1)[shard.places] < share
    return drawn


def _taken(arrays: Arrays, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
    return {name: array.take(rows, axis=0) for name, array in arrays.items()}


def _filled(array: Array, feature: Feature) -> Array:
    out = np.empty((len(array), *feature.shape), feature.dtype)
    fill(out, array, feature)
    return out


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
