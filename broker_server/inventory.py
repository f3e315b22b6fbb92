"""What is known of the devices themselves, whatever they train: one SQLite file that the server and the commands share.

What a device said last is written in groups, now and then; what the operator wants of it, at once.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Self

import msgspec

from broker_server.database import Database, Migrations, SharedFile
from broker_server.rollout import Rollout, Seat
from edge_client.errors import LedgerError
from edge_client.wire.messages import Condition, Hello

FILE = "fleet.db"
_EVERYONE = "paused"
_MIGRATIONS: Migrations = (
    (
        "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE devices (
            client TEXT PRIMARY KEY,
            seen REAL NOT NULL DEFAULT 0,
            said BLOB,
            paused INTEGER NOT NULL DEFAULT 0,
            retired REAL
        ) WITHOUT ROWID""",
        """CREATE TABLE rollouts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            made REAL NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('running', 'done', 'stopped')),
            rollout BLOB NOT NULL
        )""",
        """CREATE TABLE seats (
            rollout INTEGER NOT NULL REFERENCES rollouts,
            client TEXT NOT NULL,
            seat BLOB NOT NULL,
            PRIMARY KEY (rollout, client)
        ) WITHOUT ROWID""",
    ),
)


class Said(msgspec.Struct, frozen=True, array_like=True):
    """What a device has said of itself."""

    model: int
    """The version of the model that it holds."""
    samples: int
    available: bool
    software: str
    condition: Condition = Condition()

    @classmethod
    def of(cls, hello: Hello) -> Self:
        """What a hello says."""
        return cls(hello.version, hello.samples, hello.available, hello.software, hello.condition)


class Device(NamedTuple):
    """A device; times are seconds since 1970."""

    client: str
    seen: float
    """When it was heard last; 0 where it never was."""
    said: Said | None
    paused: bool = False
    retired: float | None = None


class Inventory(SharedFile):
    """For one thread; others, and other processes, may have the same file open.

    Raises (from everything):
        LedgerError: the file is damaged, or the disk refuses.
    """

    @classmethod
    def open(cls, state: Path) -> Self:
        """Open that of a federation's state folder, or make it."""
        path = state / FILE
        with _alone(path):
            if not path.exists():
                Database.write_to(path, _MIGRATIONS).close()
            return cls(Database.share(path, _MIGRATIONS))

    # Devices.

    def devices(self) -> dict[str, Device]:
        """All devices by name."""
        rows = self._database.all("SELECT client, seen, said, paused, retired FROM devices ORDER BY client")
        return {
            client: Device(client, seen, _said(said), bool(paused), retired)
            for client, seen, said, paused, retired in rows
        }

    def saw(self, said: Mapping[str, tuple[float, Said]]) -> None:
        """Devices were heard, at times in seconds since 1970."""
        with self.group():
            for client, (seen, what) in said.items():
                self._database.write(
                    "INSERT INTO devices (client, seen, said) VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
                    " SET seen = excluded.seen, said = excluded.said",
                    client,
                    seen,
                    msgspec.msgpack.encode(what),
                )

    def pause(self, clients: Iterable[str], *, paused: bool) -> None:
        """Have devices pause, or go on; also such as are not known yet."""
        with self.group():
            for client in clients:
                self._database.write(
                    "INSERT INTO devices (client, paused) VALUES (?, ?) ON CONFLICT DO UPDATE"
                    " SET paused = excluded.paused",
                    client,
                    paused,
                )

    @property
    def everyone(self) -> bool:
        """Whether everybody pauses."""
        return self._database.one("SELECT 1 FROM notes WHERE key = ?", _EVERYONE) is not None

    def pause_all(self, *, paused: bool) -> None:
        """Have everybody pause, or go on: then also each who was told to pause by name."""
        with self.group():
            if paused:
                self._database.write("INSERT OR IGNORE INTO notes VALUES (?, '')", _EVERYONE)
            else:
                self._database.write("DELETE FROM notes WHERE key = ?", _EVERYONE)
                self._database.write("UPDATE devices SET paused = 0")

    def retire(self, client: str, now: float) -> None:
        """A device is not asked any more, for good."""
        self._database.write(
            "INSERT INTO devices (client, retired) VALUES (?, ?) ON CONFLICT DO UPDATE"
            " SET retired = coalesce(retired, excluded.retired)",
            client,
            now,
        )

    # Rollouts.

    def begin(self, rollout: Rollout, now: float) -> int:
        """A new rollout, which takes the place of the one under way; its number."""
        with self.group():
            for number, one in self.rollouts("running").items():
                self.keep(number, msgspec.structs.replace(one, state="stopped", reason=f"{rollout.version} followed"))
            self._database.write(
                "INSERT INTO rollouts (made, state, rollout) VALUES (?, ?, ?)",
                now,
                rollout.state,
                msgspec.msgpack.encode(rollout),
            )
            row = self._database.one("SELECT max(id) FROM rollouts")
            assert row is not None
            return int(row[0])

    def rollouts(self, *states: Literal["running", "done", "stopped"]) -> dict[int, Rollout]:
        """Rollouts by number, the oldest first; of these states only, where some are named."""
        rows = self._database.all("SELECT id, state, rollout FROM rollouts ORDER BY id")
        return {
            number: msgspec.msgpack.decode(data, type=Rollout)
            for number, state, data in rows
            if not states or state in states
        }

    def latest(self) -> tuple[int, Rollout] | None:
        """The newest rollout, and its number."""
        row = self._database.one("SELECT id, rollout FROM rollouts ORDER BY id DESC LIMIT 1")
        return None if row is None else (int(row[0]), msgspec.msgpack.decode(row[1], type=Rollout))

    def keep(self, number: int, rollout: Rollout, seats: Mapping[str, Seat] | None = None) -> None:
        """How far a rollout is, and ``seats`` that have changed; one that somebody has stopped stays so."""
        with self.group():
            self._database.write(
                "UPDATE rollouts SET state = ?, rollout = ? WHERE id = ? AND state != 'stopped'",
                rollout.state,
                msgspec.msgpack.encode(rollout),
                number,
            )
            for client, seat in (seats or {}).items():
                self._database.write(
                    "INSERT INTO seats VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET seat = excluded.seat",
                    number,
                    client,
                    msgspec.msgpack.encode(seat),
                )

    def seats(self, number: int) -> dict[str, Seat]:
        """Who is asked in a rollout, and what became of it."""
        rows = self._database.all("SELECT client, seat FROM seats WHERE rollout = ?", number)
        return {client: msgspec.msgpack.decode(seat, type=Seat) for client, seat in rows}


def _said(data: bytes | None) -> Said | None:
    """What an older or a newer server wrote may not be understood: the device says it again."""
    if data is None:
        return None
    try:
        return msgspec.msgpack.decode(data, type=Said)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for others that make or migrate the file; the kernel lets go of what a process held, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        turn = os.open(path.with_name(path.name + ".turn"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LedgerError(f"{path}: cannot be created ({error.strerror}); name a state folder to write to") from error
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
    finally:
        os.close(turn)
