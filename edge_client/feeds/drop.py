"""A drop directory: other programs put files into it, and the client trains on what is whole.

A file is taken when nothing has been written to it for some seconds; names that begin with a dot or end in ``.part``,
``.tmp`` or ``~`` are their writers' own, so that a program may write under such a name and rename. A file that cannot
be used is named once in the log, and tried again when it changes.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.data import Arrays, check, read_npz, read_table, table_arrays
from edge_client.errors import DataError
from edge_client.feeds.images import SUFFIXES, label_of, read_image
from edge_client.feeds.shards import MEMORY, Shard, Shards
from edge_client.manifest import Manifest

_UNFINISHED = (".part", ".tmp", ".new", ".crdownload", "~")
_LARGEST = 256 << 20
"""Bytes of the largest file that is read: a device's memory has to hold it."""
BELIEVABLE = 1_767_225_600.0
"""2026-01-01: boards without a clock wake up earlier than that, and do not know how old a file is."""


@dataclass(frozen=True)
class Retention:
    """What is removed, the oldest first; 0 is never."""

    size: int = 0
    """Bytes that may stay."""
    seconds: float = 0.0
    """Age at which a file goes, by the time of its last change."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    size: int
    changed: int
    """Nanoseconds since 1970."""

    @property
    def version(self) -> tuple[int, int]:
        return self.size, self.changed


class DropFolder:
    """The samples in ``folder``: ``.npz`` and ``.csv`` files (as `open_data` takes them, each on its own) there and in
    its folders, and images in folders named after their class.

    Args:
        folder: the directory; one that is not there yet has no samples.
        manifest: the bundle's.
        log: gets a line for each file that cannot be used.
        quiet: seconds for which a file must not have changed.
        retention: which files are removed.
        memory: as in `Shards`.
        wall, clock: the time, as ``time.time`` and ``time.monotonic`` tell it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        log: Callable[[str], None],
        *,
        quiet: float = 5.0,
        retention: Retention | None = None,
        memory: int = MEMORY,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shards = Shards(manifest, memory=memory)
        self._folder, self._manifest, self._log = folder, manifest, log
        self._quiet, self._retention = quiet, retention or Retention()
        self._wall, self._clock = wall, clock
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._known: dict[str, Shard] = {}
        self._bad: dict[str, tuple[int, int]] = {}
        self._told = ""

    def refresh(self) -> None:
        """Remove what is too old or too much, and look for what is new."""
        files = self._retained(sorted(self._files(), key=lambda file: file.name))
        names = {file.name for file in files}
        for gone in (self._seen, self._known, self._bad):
            for name in [name for name in gone if name not in names]:
                del gone[name]
        for file in files:
            if self._whole(file) and self._bad.get(file.name) != file.version:
                self._take(file)
        self.shards.replace(tuple(self._known[name] for name in sorted(self._known)))

    def _files(self) -> Iterator[_File]:
        yield from self._scan(self._folder, "")

    def _scan(self, folder: Path, prefix: str) -> Iterator[_File]:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        except OSError as error:
            self._say(f"{folder}: {error.strerror}; the client's user must be able to read it")
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith(_UNFINISHED):
                continue
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # its writer has renamed or removed it
            if stat.S_ISDIR(found.st_mode) and not prefix:
                yield from self._scan(Path(entry.path), f"{entry.name}/")
            elif stat.S_ISREG(found.st_mode):
                yield _File(Path(entry.path), prefix + entry.name, found.st_size, found.st_mtime_ns)

    def _whole(self, file: _File) -> bool:
        """Whether the file has not changed for a while: by its own date, or as seen here where clocks disagree."""
        version, since = self._seen.get(file.name, (None, 0.0))
        if version != file.version:
            self._seen[file.name] = (file.version, self._clock())
            return 0 <= self._quiet <= self._wall() - file.changed / 1e9
        return self._clock() - since >= self._quiet or self._quiet <= self._wall() - file.changed / 1e9

    def _take(self, file: _File) -> None:
        known = self._known.get(file.name)
        if known is not None and known.version == file.version:
            return
        self._known.pop(file.name, None)
        try:
            arrays = self._read(file)
        except DataError as error:
            self._bad[file.name] = file.version
            self._log(f"skipped {error}")
            return
        rows = len(arrays[self._manifest.inputs[0].name])
        size = sum(array.nbytes for array in arrays.values())
        shard = Shard(file.name, file.version, np.arange(rows), size, lambda: self._read(file))
        self._known[file.name] = shard
        self.shards.keep(shard, arrays)

    def _read(self, file: _File) -> Arrays:
        try:
            return self._parsed(file)
        except DataError:
            raise
        except Exception as error:
            # Whatever strangers' files do to those who read them, also to memory: they must not end the client.
            raise DataError(f"{file.path}: cannot be read ({type(error).__name__}: {error})") from error

    def _parsed(self, file: _File) -> Arrays:
        path, suffix = file.path, file.path.suffix.lower()
        if file.size > _LARGEST:
            raise DataError(f"{path}: {file.size >> 20} MiB; a file may have {_LARGEST >> 20}: make several of it")
        if suffix == ".npz":
            arrays: Arrays = read_npz(path)
        elif suffix == ".csv":
            arrays = table_arrays(path, *read_table(path), self._manifest)
        elif suffix in SUFFIXES:
            label = label_of(path, self._manifest)
            image, target = self._manifest.inputs[0], self._manifest.targets[0]
            arrays = {image.name: read_image(path, image)[np.newaxis], target.name: np.array([label], np.int64)}
        else:
            raise DataError(f"{path}: expected .npz, .csv, or an image in a folder named after its class")
        try:
            check(arrays, self._manifest)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return {f.name: arrays[f.name] for f in (*self._manifest.inputs, *self._manifest.targets)}

    def _retained(self, files: list[_File]) -> list[_File]:
        """Remove what retention does not keep; files that are being written stay."""
        # One that alone is more than may stay goes itself, and takes no other with it.
        most, now, kept = self._retention.size, self._wall(), list[_File]()
        left = sum(file.size for file in files if file.size <= most)
        for file in sorted(files, key=lambda file: (file.changed, file.name)):
            age = now - file.changed / 1e9
            old = 0 < self._retention.seconds < age and now >= BELIEVABLE
            much = 0 < most < (left if file.size <= most else file.size)
            if (old or much) and self._whole(file):
                try:
                    file.path.unlink(missing_ok=True)
                except OSError as error:
                    self._say(f"{file.path}: {error.strerror}; retention needs a folder that its group may write to")
                    kept.append(file)
                # Others do not go in the place of one that cannot be removed.
                left -= file.size if file.size <= most else 0
                continue
            kept.append(file)
        return sorted(kept, key=lambda file: file.name)

    def _say(self, line: str) -> None:
        if line != self._told:
            self._told = line
            self._log(line)
