"""A SQLite file: durable, migrated, its errors explained; with one writer under a lock, or several in turn."""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from edge_client.errors import LedgerError

APPLICATION = 0x66656467
"""``PRAGMA application_id`` of our files: "fedg"."""
_PATIENCE = 10.0
"""Seconds to wait for another writer of a shared file."""

Migrations = tuple[tuple[str, ...], ...]
"""Schema n is what the statements of the first n migrations make; a released migration never changes."""


class Lock:
    """The right to write to one file. The kernel frees it with the process, however that ends.

    Raises:
        LedgerError: another process, or another lock of this one, has it; the folder cannot be made or written to.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot be created ({error.strerror}); name a state folder to write to"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise LedgerError(
                f"{path}: another server has it open; stop that one, or name another state folder"
            ) from error
        self.path = path
        self._file: int | None = lock

    def close(self) -> None:
        """Let the next writer in; closing twice is harmless."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Database:
    """A connection for one thread. Statements raise LedgerError, which says what to do, never sqlite3's own errors."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: Lock | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock
        self._depth = 0

    @classmethod
    def write_to(cls, path: Path, migrations: Migrations, lock: Lock | None = None) -> Self:
        """Open for writing, or create, under the caller's ``lock`` on the path, or one of its own until closed.

        Raises:
            LedgerError: another process has it open, or it is damaged, foreign, of a newer schema, or not writable.
        """
        own = Lock(path) if lock is None else None
        try:
            with explained(path):
                connection = sqlite3.connect(path, isolation_level=None)
        except LedgerError:
            if own is not None:
                own.close()
            raise
        database = cls(path, connection, own)
        try:
            with explained(path):
                database._prepare(migrations)
        except LedgerError:
            database.close()
            raise
        return database

    @classmethod
    def share(cls, path: Path, migrations: Migrations) -> Self:
        """Open an existing file for writing beside others who do so too, each in short groups.

        Raises:
            LedgerError: it is damaged, foreign, of a newer schema, or not writable.
        """
        with explained(path):
            database = cls(path, sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None), None)
        try:
            with explained(path), contextlib.ExitStack() as stack:
                if database._schema(len(migrations)) < len(migrations):
                    stack.enter_context(Lock(path))
                database._prepare(migrations)
        except LedgerError:
            database.close()
            raise
        return database

    @classmethod
    def read_from(cls, path: Path, migrations: Migrations) -> Self:
        """Open an existing file for reading, beside its writer.

        Raises:
            LedgerError: there is no such file, or it is damaged, foreign or of another schema.
        """
        if not path.is_file():
            raise LedgerError(f"{path}: there is no ledger; has the federation been served from this state folder?")
        with explained(path):
            database = cls(path, sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True), None)
        try:
            with explained(path):
                found = database._schema(len(migrations))
            if found < len(migrations):
                raise LedgerError(
                    f"{path}: has schema {found}; expected {len(migrations)}: start the server once to migrate it"
                )
        except LedgerError:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file and let the next writer in; closing twice is harmless."""
        self._connection.close()
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Everything inside happens together or not at all; the outermost group is one commit, then on the disk."""
        mark = f"level_{self._depth}"
        with explained(self.path):
            self._connection.execute(f"SAVEPOINT {mark}" if self._depth else "BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                self._connection.execute(f"RELEASE {mark}" if self._depth > 1 else "COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._connection.in_transaction:
                    self._connection.execute(f"ROLLBACK TO {mark}" if self._depth > 1 else "ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row, or None."""
        with explained(self.path):
            row: tuple[Any, ...] | None = self._connection.execute(query, values).fetchone()
            return row

    def all(self, query: str, *values: object) -> Sequence[tuple[Any, ...]]:
        """All rows."""
        with explained(self.path):
            return self._connection.execute(query, values).fetchall()

    def write(self, statement: str, *values: object) -> int:
        """Run one statement, in a commit of its own unless in a group; returns the number of rows it changed."""
        with explained(self.path):
            return self._connection.execute(statement, values).rowcount

    def _prepare(self, migrations: Migrations) -> None:
        found = self._schema(len(migrations))
        # FULL: a commit returns when the log is on the disk, so that a receipt is never a lie after a power cut.
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "journal_size_limit = 67108864",
        ):
            self._connection.execute(f"PRAGMA {pragma}")
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if found == len(migrations):
            return
        if found:
            self._copy(found)
        with self.group():
            for migration in migrations[found:]:
                for statement in migration:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
            self._connection.execute(f"PRAGMA user_version = {len(migrations)}")

    def _copy(self, schema: int) -> None:
        """Keep the file as the older fedge wrote it, for a way back."""
        kept = self.path.with_name(f"{self.path.name}.schema-{schema}")
        partial = kept.with_name(kept.name + ".new")
        try:
            partial.unlink(missing_ok=True)
            self._connection.execute("VACUUM INTO ?", (str(partial),))
            os.replace(partial, kept)
        except OSError as error:
            raise LedgerError(f"{kept}: {error.strerror}; the ledger is not migrated without a copy") from error

    def _schema(self, known: int) -> int:
        """The file's schema number; 0 when it is new."""
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION and (tables or application or found):
            raise LedgerError(f"{self.path}: is an SQLite file of another program; name another state folder")
        if found > known:
            raise LedgerError(
                f"{self.path}: has schema {found}, written by a newer fedge; this one knows up to {known}: "
                "upgrade fedge, or start with a new state folder"
            )
        return int(found)


class SharedFile:
    """What a server and commands write together, in a file that `Database.share` opens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def group(self) -> Iterator[None]:
        """Everything inside is read and written together, while nobody else writes; all or nothing."""
        with self._database.group():
            yield

    def revision(self) -> int:
        """A number that is another one whenever somebody else has changed something; cheap to ask for."""
        row = self._database.one("PRAGMA data_version")
        assert row is not None
        return int(row[0])


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn sqlite3's errors into LedgerErrors that say what to do."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise LedgerError(f"{path}: refused an entry that contradicts what it holds ({error})") from error
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{path}: {error}; check the disk's free space and the file's permissions") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: is damaged ({error}); restore a copy, or move it away to start anew") from error
