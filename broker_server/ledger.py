"""What the server must not forget: one SQLite file, every commit on the disk before it is acknowledged.

The ledger holds open tasks and the updates recorded for them, the versions of the global model, the rounds' results,
what evaluations found, the topics that are retained on the broker, what clients did wrong, and notes. A crash at any
moment leaves the last commit; a task and the version made from it change in one transaction, so an update is counted in
exactly one version. Of closed tasks it remembers the last ones, to answer those who did not hear what became of their
updates.

All calls on one ledger come from the thread that opened it.
"""

import hashlib
import math
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Self

import msgspec

from broker_server.database import Database, Lock
from broker_server.ledger_schema import MIGRATIONS
from broker_server.records import Misconduct, Round, Task, Version
from edge_client.errors import LedgerError

BEST = "best_version"
"""The note that holds the number of the best version, which ``prune`` keeps."""
REMEMBERED = 100_000
"""Invitations, the latest ones, whose tasks are remembered; some 25 MB. A closed task of before is forgotten."""
_EPOCH = "epoch"
_FORGOTTEN_AT_ONCE = 100
"""Tasks that one close may delete, so that a ledger that grew for years does not hold up a round."""
_MISCONDUCT_KEPT = 10_000
"""Rows: whoever makes names up could fill the disk with what is said about them."""


class Ledger:
    """The ledger of one federation; see ``open`` for the server and ``read`` for everybody else."""

    def __init__(self, database: Database) -> None:
        self.path = database.path
        self._database = database

    @classmethod
    def open(cls, path: str | Path, *, federation: str, bundle: str, lock: Lock | None = None) -> Self:
        """Open the ledger for writing, or create it; ``bundle`` is the bundle's SHA-256.

        ``lock`` is the caller's lock on the path, where it was taken before; it stays the caller's.

        Raises:
            LedgerError: another server has it open; it belongs to another federation or bundle; it is damaged, foreign
                or of a newer schema; the disk refuses.
        """
        ledger = cls(Database.write_to(Path(path), MIGRATIONS, lock))
        try:
            ledger._identify(federation, bundle)
        except LedgerError:
            ledger.close()
            raise
        return ledger

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Open an existing ledger for reading, also while the server writes to it; every write then raises.

        Raises:
            LedgerError: there is none, or it is damaged, foreign or of another schema.
        """
        return cls(Database.read_from(Path(path), MIGRATIONS))

    def close(self) -> None:
        """Close the file and let the next server in; closing twice is harmless."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def group(self) -> AbstractContextManager[None]:
        """Everything inside becomes one commit, on the disk when the block ends; an exception undoes all of it."""
        return self._database.group()

    # -- epochs and notes

    def new_epoch(self) -> int:
        """Count one more server start, from the time (seconds since 1970) of the first.

        So a new state folder continues above the epochs of the one before: clients take a lower epoch for an old
        server's, and would not follow it.
        """
        with self.group():
            before = self.get(_EPOCH)
            epoch = int(time.time()) if before is None else int(before) + 1
            self.put(_EPOCH, str(epoch))
        return epoch

    def get(self, key: str) -> str | None:
        """A note, or None."""
        row = self._database.one("SELECT value FROM notes WHERE key = ?", key)
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        """Write a note over the one before."""
        self._database.write(
            "INSERT INTO notes VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", key, value
        )

    # -- tasks

    def open_task(self, task: Task) -> None:
        """Begin a task with its first cohort.

        Raises:
            LedgerError: (epoch, task) has been used before.
        """
        with self.group():
            self._database.write(
                "INSERT INTO tasks (epoch, task, round, kind, version, plan, opened) VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(task.epoch, task.task, task.round, task.kind, task.version, task.plan, task.opened),
            )
            self.invite(task.epoch, task.task, task.cohort)

    def invite(self, epoch: int, task: int, clients: Iterable[str]) -> None:
        """Add members to a task's cohort; those who are in it stay where they are."""
        with self.group():
            for client in clients:
                self._database.write(
                    "INSERT INTO members VALUES (NULL, ?, ?, ?) ON CONFLICT DO NOTHING", epoch, task, client
                )

    def open_tasks(self) -> list[Task]:
        """Tasks that are neither done nor void, of all epochs, oldest first."""
        columns = "epoch, task, round, kind, version, plan, opened"
        tasks = []
        for row in self._database.all(f"SELECT {columns} FROM tasks WHERE outcome IS NULL ORDER BY epoch, task"):  # noqa: S608
            members = self._database.all(
                "SELECT client FROM members WHERE epoch = ? AND task = ? ORDER BY id", *row[:2]
            )
            fields = dict(zip(columns.split(", "), row, strict=True))
            tasks.append(Task(cohort=tuple(client for (client,) in members), **fields))
        return tasks

    def last_task(self) -> int:
        """The highest task number used in any epoch; 0 before the first."""
        row = self._database.one("SELECT max(task) FROM tasks")
        return int(row[0] or 0) if row else 0

    def close_task(self, epoch: int, task: int, outcome: Literal["done", "void"]) -> None:
        """End a task and drop its updates' data; their size and hash stay for as long as the task is remembered.

        Raises:
            LedgerError: there is no such open task.
        """
        with self.group():
            changed = self._database.write(
                "UPDATE tasks SET outcome = ? WHERE epoch = ? AND task = ? AND outcome IS NULL", outcome, epoch, task
            )
            if changed != 1:
                raise LedgerError(f"{self.path}: task {epoch}/{task} is not open, so it cannot become {outcome}")
            self._database.write("UPDATE updates SET data = NULL WHERE epoch = ? AND task = ?", epoch, task)
            self._forget()

    def outcome(self, epoch: int, task: int) -> str | None:
        """How a task ended, "done" or "void"; None while it is open, and when there is none or it is forgotten."""
        row = self._database.one("SELECT outcome FROM tasks WHERE epoch = ? AND task = ?", epoch, task)
        return None if row is None or row[0] is None else str(row[0])

    # -- updates

    def record(self, epoch: int, task: int, client: str, data: bytes, samples: int) -> bool:
        """Keep a client's update, exactly once: False, and nothing changes, when the task has one from it already.

        On return (outside a ``group``) the update is on the disk: a receipt may say so.

        Raises:
            LedgerError: there is no such open task, so the update would never be counted.
        """
        with self.group():
            if not self._database.one(
                "SELECT 1 FROM tasks WHERE epoch = ? AND task = ? AND outcome IS NULL", epoch, task
            ):
                raise LedgerError(f"{self.path}: task {epoch}/{task} is not open; an update for it cannot be recorded")
            digest = hashlib.sha256(data).digest()
            added = self._database.write(
                "INSERT INTO updates VALUES (NULL, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                *(epoch, task, client, samples, len(data), digest, data),
            )
        return added == 1

    def updates(self) -> Iterator[tuple[tuple[int, int], str, int, bytes]]:
        """((epoch, task), client, samples, data) of the updates to open tasks, as recorded; one in memory at a time."""
        # Ids first: a cursor that stays open would see, or not see, what is recorded while the caller works.
        for (number,) in self._database.all(
            "SELECT id FROM updates JOIN tasks USING (epoch, task) WHERE outcome IS NULL ORDER BY id"
        ):
            row = self._database.one(
                "SELECT epoch, task, client, samples, data FROM updates WHERE id = ? AND data IS NOT NULL", number
            )
            if row is not None:
                epoch, task, client, samples, data = row
                yield (epoch, task), client, samples, data

    def update(self, epoch: int, task: int, client: str) -> bytes:
        """The update of a client to an open task.

        Raises:
            LedgerError: there is none.
        """
        row = self._database.one(
            "SELECT data FROM updates WHERE epoch = ? AND task = ? AND client = ? AND data IS NOT NULL",
            *(epoch, task, client),
        )
        if row is None:
            raise LedgerError(f"{self.path}: there is no update of {client} to task {epoch}/{task} any more")
        return bytes(row[0])

    def recorded(self, epoch: int, task: int) -> list[str]:
        """Clients whose update is recorded, in that order; also for closed tasks, until they are forgotten."""
        rows = self._database.all("SELECT client FROM updates WHERE epoch = ? AND task = ? ORDER BY id", epoch, task)
        return [client for (client,) in rows]

    def voids(self) -> dict[str, tuple[int, int]]:
        """By client, the task (epoch, task) that its last recorded update was for, where that is void."""
        rows = self._database.all(
            "SELECT client, epoch, task FROM (SELECT max(id) AS id FROM updates GROUP BY client) "
            "JOIN updates USING (id) JOIN tasks USING (epoch, task) WHERE outcome = 'void'"
        )
        return {client: (epoch, task) for client, epoch, task in rows}

    # -- versions

    def publish(self, version: Version, closes: Iterable[tuple[int, int]] = ()) -> None:
        """Store a new version and, in the same transaction, close the tasks (epoch, task) that it was made from.

        Raises:
            LedgerError: the version exists, or a task is not open: its updates are counted elsewhere.
        """
        with self.group():
            for epoch, task in closes:
                self.close_task(epoch, task, "done")
            self._database.write(
                "INSERT INTO versions (version, round, state, remainder, optimizer, pace, anchor) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(version.version, version.round, version.state),
                *(version.remainder, version.optimizer, version.pace, version.anchor),
            )

    def version(self, number: int) -> Version | None:
        """One version, or None."""
        return self._version("WHERE version = ?", number)

    def latest(self) -> Version | None:
        """The newest version, or None before the first."""
        return self._version("ORDER BY version DESC LIMIT 1")

    def versions(self) -> list[tuple[int, int, bool]]:
        """(version, round, whether its state is still here) of every version, oldest first."""
        rows = self._database.all("SELECT version, round, length(state) > 0 FROM versions ORDER BY version")
        return [(number, made_in, bool(kept)) for number, made_in, kept in rows]

    def prune(self, keep: Collection[int]) -> None:
        """Drop the bytes of all versions but ``keep``, the latest and the best (note ``BEST``); their rows stay.

        What only a next version needs is kept of the latest alone.
        """
        best = self.get(BEST)
        kept = {*keep, *({int(best)} if best else ())}
        with self.group():
            rows = self._database.all(
                "SELECT version FROM versions WHERE length(state) > 0 AND version < (SELECT max(version) FROM versions)"
            )
            for (number,) in rows:
                self._database.write("UPDATE versions SET remainder = x'', optimizer = x'' WHERE version = ?", number)
                if number not in kept:
                    self._database.write("UPDATE versions SET state = x'' WHERE version = ?", number)

    # -- rounds

    def finish_round(self, result: Round, *, finished: bool = True) -> None:
        """Write a round's result, over one of the same number; ``finished`` False: its evaluation is still to come."""
        self._database.write(
            "INSERT OR REPLACE INTO rounds "
            "(round, version, clients, samples, seconds, bytes_up, bytes_down, metrics, finished) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(result.round, result.version, result.clients, result.samples, result.seconds),
            *(result.bytes_up, result.bytes_down, msgspec.json.encode(result.metrics).decode(), finished),
        )

    def unfinished(self) -> int | None:
        """The number of the last round, where its result is here and its evaluation is still to come."""
        row = self._database.one("SELECT round, finished FROM rounds ORDER BY round DESC LIMIT 1")
        return int(row[0]) if row is not None and not row[1] else None

    def rounds(self) -> list[Round]:
        """All rounds that have a result, in order."""
        columns = "round, version, clients, samples, seconds, bytes_up, bytes_down"
        rounds = []
        for *row, text in self._database.all(f"SELECT {columns}, metrics FROM rounds ORDER BY round"):  # noqa: S608
            # JSON has no NaN; msgspec writes null for it.
            stored = msgspec.json.decode(text, type=dict[str, float | None])
            metrics = {name: math.nan if value is None else value for name, value in stored.items()}
            rounds.append(Round(metrics=metrics, **dict(zip(columns.split(", "), row, strict=True))))
        return rounds

    # -- findings

    def find(self, round_: int, data: bytes) -> None:
        """Keep what an evaluation found, beside the first findings: those of between are forgotten."""
        with self.group():
            self._database.write("INSERT OR REPLACE INTO findings VALUES (?, ?)", round_, data)
            self._database.write(
                "DELETE FROM findings WHERE round > (SELECT min(round) FROM findings) AND round < ?", round_
            )

    def findings(self) -> list[bytes]:
        """What the first and the newest evaluation found, as it was given."""
        return [bytes(data) for (data,) in self._database.all("SELECT data FROM findings ORDER BY round")]

    # -- misconduct

    def accuse(self, fault: Misconduct) -> None:
        """Note what a client did; of very many notes the oldest are forgotten."""
        with self.group():
            self._database.write(
                "INSERT INTO misconduct VALUES (NULL, ?, ?, ?, ?, ?)",
                *(fault.time, fault.client, fault.kind, fault.reason, fault.seconds),
            )
            self._database.write(
                "DELETE FROM misconduct WHERE id <= (SELECT max(id) FROM misconduct) - ?", _MISCONDUCT_KEPT
            )

    def misconduct(self) -> list[Misconduct]:
        """What clients did wrong, oldest first."""
        rows = self._database.all("SELECT time, client, kind, reason, seconds FROM misconduct ORDER BY id")
        return [Misconduct(*row) for row in rows]

    # -- retained topics

    def retain(self, topics: Iterable[str]) -> None:
        """Note topics before anything is retained on them, so that they can always be cleared."""
        with self.group():
            for topic in topics:
                self._database.write("INSERT INTO retained VALUES (NULL, ?) ON CONFLICT DO NOTHING", topic)

    def released(self, topics: Iterable[str]) -> None:
        """Forget topics that have been cleared."""
        with self.group():
            for topic in topics:
                self._database.write("DELETE FROM retained WHERE topic = ?", topic)

    def retained(self) -> list[str]:
        """Topics that may hold a retained message, oldest first."""
        return [topic for (topic,) in self._database.all("SELECT topic FROM retained ORDER BY id")]

    # -- inside

    def _identify(self, federation: str, bundle: str) -> None:
        with self.group():
            for key, asked in (("federation", federation), ("bundle", bundle)):
                found = self.get(key)
                if found is None:
                    self.put(key, asked)
                elif found != asked:
                    raise LedgerError(
                        f"{self.path}: belongs to {key} {found!r}; the federation file asks for {asked!r}: "
                        "set federation.state to a new folder, or take the old one back"
                    )

    def _forget(self) -> None:
        """Delete closed tasks of before the invitations that are remembered, oldest first.

        The newest stays, so no number is used again, and an update for a deleted task is not recorded, as for any that
        is not open. Invitations are counted, not tasks: a task is a whole round's, or one client's without rounds.
        """
        oldest = self._database.one(
            "SELECT epoch, task FROM members WHERE id <= (SELECT max(id) FROM members) - ? ORDER BY id DESC LIMIT 1",
            REMEMBERED,
        )
        if oldest is None:
            return
        for identity in self._database.all(
            "SELECT epoch, task FROM tasks WHERE (epoch, task) < (?, ?) AND outcome IS NOT NULL "
            "ORDER BY epoch, task LIMIT ?",
            *oldest,
            _FORGOTTEN_AT_ONCE,
        ):
            for table in ("updates", "members", "tasks"):
                self._database.write(f"DELETE FROM {table} WHERE epoch = ? AND task = ?", *identity)  # noqa: S608

    def _version(self, where: str, *values: object) -> Version | None:
        columns = ", ".join(Version.__struct_fields__)
        row = self._database.one(f"SELECT {columns} FROM versions {where}", *values)  # noqa: S608
        return None if row is None else Version(**dict(zip(Version.__struct_fields__, row, strict=True)))
