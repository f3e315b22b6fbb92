"""Disks that fail: under the client's store and under the server's ledger, both of which are the real ones.

Store: files lie on the machine's own file system, and this module stands between it and `edge_client.store`. It knows
what was synced; a power cut tears files that were not, and may undo renames whose folder was not. Blobs under way
(`edge_client.partial`, on both sides): records are appended in two writes, between which a node dies or the disk is
full. Ledger: SQLite on the same file system; a power cut takes what was not committed and tears the end of the log.
"""

import builtins
import errno
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

from tests.faults.world import World


@dataclass
class Medium:
    """What one node writes to."""

    world: World
    node: str
    rng: random.Random
    boundary: Callable[[str], None]
    """Called before and after every write: where a node may lose its power."""
    failing: float = 0.0
    """The probability that a write fails now."""
    ambiguous: float = 0.0
    """The probability that a commit succeeds and reports a failure."""
    connections: list["FaultyConnection"] = field(default_factory=list)
    committed: Callable[[sqlite3.Connection], None] = lambda connection: None
    """Called after each commit of a ledger on this medium."""
    unsynced: dict[str, int] = field(default_factory=dict)
    """By path, the bytes from the beginning that were."""
    moved: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    """Renames that their folder does not know of durably: from, to, and what was there."""

    def check(self, what: str) -> None:
        """Before a write: the node may die here, or the disk refuse."""
        self.boundary(what)
        if self.failing and self.rng.random() < self.failing:
            self.world.strike("failed write", self.node, what)
            raise OSError(errno.ENOSPC, "No space left on device")

    def lose_power(self) -> None:
        """What was not synced is torn, renames that were not are perhaps undone, and commits under way are gone."""
        keep = self.rng.randint(0, len(self.moved))
        for source, target, before in reversed(self.moved[keep:]):
            if not os.path.exists(target):
                continue
            self.world.strike("torn write", self.node, f"undone rename of {Path(target).name}")
            os.replace(target, source)
            if before is not None:
                Path(target).write_bytes(before)
        for path, synced in self.unsynced.items():
            if os.path.exists(path) and (size := os.path.getsize(path)) > synced:
                self.world.strike("torn write", self.node, Path(path).name)
                os.truncate(path, self.rng.randint(synced, size))
                if self.rng.random() < 0.5:
                    os.truncate(path, size)  # its length was on the disk, and its blocks were not: zeros
        self.unsynced.clear()
        self.moved.clear()
        for connection in list(self.connections):
            connection.lose_power(self.rng, self.world)

    def flush(self) -> None:
        """A process that is killed loses nothing that it has written: the system still has it."""
        self.unsynced.clear()
        self.moved.clear()
        for connection in list(self.connections):
            connection.lose_power(None, self.world)


class FaultyOs:
    """``os`` and ``open`` as the store sees them."""

    def __init__(self, disks: "Disks") -> None:
        self._disks = disks
        self._files: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def writer(self, path: str | Path, mode: str = "r") -> IO[Any]:
        """``open``."""
        medium = self._disks.of(path)
        if medium is None or mode not in ("wb", "ab"):
            return builtins.open(path, mode)
        if mode == "wb":
            medium.check(f"write {Path(path).name}")
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115
        self._files[file.fileno()] = str(path)
        if mode == "wb":
            medium.unsynced[str(path)] = 0
            return file
        medium.unsynced.setdefault(str(path), os.path.getsize(path))
        return _Log(file, medium)  # type: ignore[return-value]

    def open(self, path: str | Path, flags: int, *more: int) -> int:
        number = os.open(path, flags, *more)
        self._files[number] = str(path)
        return number

    def fsync(self, number: int) -> None:
        path = self._files[number]
        medium = self._disks.of(path)
        if medium is None:
            return
        if os.path.isdir(path):
            medium.boundary("sync folder")
            medium.moved.clear()
        else:
            medium.check(f"sync {Path(path).name}")
            medium.unsynced.pop(path, None)

    def replace(self, source: str | Path, target: str | Path) -> None:
        medium = self._disks.of(source)
        if medium is None:
            os.replace(source, target)
            return
        medium.check(f"rename {Path(target).name}")
        before = Path(target).read_bytes() if os.path.exists(target) else None
        os.replace(source, target)
        medium.moved.append((str(source), str(target), before))
        if str(source) in medium.unsynced:
            medium.unsynced[str(target)] = medium.unsynced.pop(str(source))
        medium.boundary("renamed")


class _Log:
    """A file that records are appended to."""

    def __init__(self, file: IO[Any], medium: Medium) -> None:
        self._file, self._medium = file, medium

    def write(self, data: bytes) -> None:
        part = len(data) // 2
        self._file.write(data[:part])
        self._medium.check("append")
        self._file.write(data[part:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class FaultyConnection(sqlite3.Connection):
    """A connection to a ledger whose node may die at any statement."""

    medium: Medium
    path: str
    dead = False

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
        medium = self.medium
        writes = not statement.startswith(("SELECT", "PRAGMA"))
        if writes:
            medium.boundary(f"sql {statement[:20]}")
            refused = (
                medium.failing and not statement.startswith(("ROLLBACK", "RELEASE")) and self._unlucky(medium.failing)
            )
            if refused:
                medium.world.strike("failed write", medium.node, statement[:12])
                raise sqlite3.OperationalError("database or disk is full")
        cursor = super().execute(statement, *values)
        if statement == "COMMIT":
            medium.committed(self)
            medium.boundary("committed")
            if medium.ambiguous and self._unlucky(medium.ambiguous):
                medium.world.strike("failed write", medium.node, "commit that was one")
                raise sqlite3.OperationalError("disk I/O error")
        return cursor

    def _unlucky(self, probability: float) -> bool:
        return self.medium.rng.random() < probability

    def close(self) -> None:
        self.dead = True
        if self in self.medium.connections:
            self.medium.connections.remove(self)
        super().close()

    def lose_power(self, rng: random.Random | None, world: World) -> None:
        """End here: the files are what a dead process leaves, with ``rng`` also a torn tail of the log."""
        if self.dead:
            return
        files = {name: Path(name).read_bytes() for name in (self.path, self.path + "-wal") if os.path.exists(name)}
        self.close()
        for name in (self.path + "-wal", self.path + "-shm"):
            Path(name).unlink(missing_ok=True)
        for name, data in files.items():
            if rng is not None and name.endswith("-wal") and rng.random() < 0.5:
                world.strike("torn write", self.medium.node, "log")
                data += rng.randbytes(rng.randint(1, 5000))
            Path(name).write_bytes(data)


class Disks:
    """All media of one run, by folder."""

    def __init__(self) -> None:
        self._media: dict[str, Medium] = {}

    def add(self, folder: Path, medium: Medium) -> None:
        self._media[str(folder)] = medium

    def of(self, path: str | Path) -> Medium | None:
        """The medium that a path is on; None when it never fails."""
        folder = str(path)
        return self._media.get(folder) or self._media.get(os.path.dirname(folder))

    def connect(self, path: Path, **more: Any) -> sqlite3.Connection:
        """``sqlite3.connect``."""
        medium = self.of(path)
        if medium is None:
            return sqlite3.connect(path, **more)
        connection = sqlite3.connect(path, factory=FaultyConnection, **more)
        connection.medium, connection.path = medium, str(path)
        medium.connections.append(connection)
        return connection

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put these disks under the store and the ledger."""

        class Sqlite:
            def __getattr__(self, name: str) -> Any:
                return getattr(sqlite3, name)

        sqlite = Sqlite()
        sqlite.connect = self.connect  # type: ignore[attr-defined]
        system = FaultyOs(self)
        with (
            mock.patch("edge_client.store.os", system),
            mock.patch("edge_client.store.open", system.writer, create=True),
            mock.patch("edge_client.partial.os", system),
            mock.patch("edge_client.partial.open", system.writer, create=True),
            mock.patch("edge_client.partial._SYNC", 3000),
            mock.patch("broker_server.database.sqlite3", sqlite),
        ):
            yield
