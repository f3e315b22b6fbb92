"""Who is enrolled: devices, their certificates, and claims, in one SQLite file that the server and the commands share.

A claim is open until a device asks with it; then it is that device's for good, by its public key, whatever becomes of
the request: waiting for approval, approved, issued or refused.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, Self

from broker_server.database import Database, Migrations, SharedFile
from edge_client.errors import ConfigError

State = Literal["open", "pending", "approved", "issued", "refused"]

_MIGRATIONS: Migrations = (
    (
        """CREATE TABLE claims (
            user TEXT PRIMARY KEY,
            public BLOB NOT NULL,
            serial TEXT NOT NULL,
            made REAL NOT NULL,
            expires REAL NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'pending', 'approved', 'issued', 'refused')),
            client TEXT,
            device BLOB,
            asked REAL,
            detail TEXT NOT NULL DEFAULT ''
        ) WITHOUT ROWID""",
        # Of one device all that were issued, for the list of what is revoked; the last one is what the device has.
        """CREATE TABLE certificates (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            serial TEXT NOT NULL UNIQUE,
            client TEXT NOT NULL,
            public BLOB NOT NULL,
            der BLOB NOT NULL,
            issued REAL NOT NULL,
            expires REAL NOT NULL,
            revoked REAL
        )""",
        "CREATE INDEX certificates_client ON certificates (client, id)",
        "CREATE INDEX certificates_public ON certificates (public, id)",
        "CREATE TABLE revoked (serial TEXT PRIMARY KEY, at REAL NOT NULL, expires REAL NOT NULL) WITHOUT ROWID",
    ),
)


class ClaimRow(NamedTuple):
    """A claim, and the device that asked with it; times are seconds since 1970, keys 32 bytes."""

    user: str
    public: bytes
    serial: str
    made: float
    expires: float
    state: State
    client: str | None
    device: bytes | None
    asked: float | None
    detail: str


class DeviceRow(NamedTuple):
    """The newest certificate of a device."""

    serial: str
    client: str
    public: bytes
    der: bytes
    issued: float
    expires: float
    revoked: float | None

    def valid(self, now: float) -> bool:
        """Whether the device is enrolled at ``now``."""
        return self.revoked is None and now < self.expires


_CLAIM = "SELECT user, public, serial, made, expires, state, client, device, asked, detail FROM claims"
_DEVICE = "SELECT serial, client, public, der, issued, expires, revoked FROM certificates"


class Registry(SharedFile):
    """For one thread; others, and other processes, may have the same file open.

    Raises (from everything):
        LedgerError: the file is damaged, or the disk refuses.
    """

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make an empty one, or open what is there; for its owner alone.

        Raises:
            ConfigError: the disk refuses.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Before there is anything in it; SQLite gives its other files the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be created ({error.strerror}); check disk and permissions") from error
        path.chmod(0o600)
        Database.write_to(path, _MIGRATIONS).close()
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open one that is there.

        Raises:
            ConfigError: there is none.
        """
        if not path.is_file():
            raise ConfigError(f"{path}: there is no registry of devices; make an authority with `fedge ca init`")
        return cls(Database.share(path, _MIGRATIONS))

    # Devices.

    def keys(self, now: float) -> dict[str, bytes]:
        """By client, the public keys of devices that are neither revoked nor expired at ``now``."""
        return {device.client: device.public for device in self.devices() if device.valid(now)}

    def devices(self) -> list[DeviceRow]:
        """All devices by name, with their newest certificates."""
        newest = "id IN (SELECT max(id) FROM certificates GROUP BY client)"
        return [DeviceRow(*row) for row in self._database.all(f"{_DEVICE} WHERE {newest} ORDER BY client")]

    def standing(self, now: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the devices that are enrolled at ``now``, and of those that were."""
        devices = self.devices()
        valid = tuple(device.client for device in devices if device.valid(now))
        return valid, tuple(device.client for device in devices if not device.valid(now))

    def device(self, client: str) -> DeviceRow | None:
        """A device by name."""
        row = self._database.one(f"{_DEVICE} WHERE client = ? ORDER BY id DESC LIMIT 1", client)
        return None if row is None else DeviceRow(*row)

    def owner(self, public: bytes) -> DeviceRow | None:
        """Whose key this is, or was last."""
        row = self._database.one(f"{_DEVICE} WHERE public = ? ORDER BY id DESC LIMIT 1", public)
        return None if row is None else DeviceRow(*row)

    def certify(self, device: DeviceRow) -> None:
        """A certificate was issued; it takes the place of the device's last one."""
        self._database.write(
            "INSERT INTO certificates (serial, client, public, der, issued, expires, revoked) VALUES (?,?,?,?,?,?,?)",
            *device,
        )

    def revoke(self, client: str, now: float) -> bool:
        """Nothing that was issued to a device is valid any more; false where it has nothing that was."""
        with self.group():
            self._database.write(
                "INSERT OR IGNORE INTO revoked SELECT serial, ?, expires FROM certificates"
                " WHERE client = ? AND revoked IS NULL",
                now,
                client,
            )
            return (
                self._database.write(
                    "UPDATE certificates SET revoked = ? WHERE client = ? AND revoked IS NULL", now, client
                )
                > 0
            )

    def barred(self, client: str, now: float) -> float | None:
        """Until when, in seconds since 1970, something that was revoked carries this name; None where nothing does.

        Brokers that know names only (NATS, EMQX) would let it in again if the name was enrolled anew before that.
        """
        row = self._database.one(
            "SELECT max(expires) FROM certificates WHERE client = ? AND revoked IS NOT NULL AND expires > ?",
            client,
            now,
        )
        return None if row is None or row[0] is None else float(row[0])

    def revoked(self, now: float) -> list[tuple[str, float]]:
        """Serial and time of revocation of certificates that would be valid at ``now``."""
        rows = self._database.all("SELECT serial, at FROM revoked WHERE expires > ? ORDER BY at, serial", now)
        return [(str(serial), float(at)) for serial, at in rows]

    # Claims.

    def add_claims(self, claims: Iterable[tuple[str, bytes, str, float]], now: float) -> None:
        """New claims: user, public key, serial of its certificate, and when it expires."""
        with self.group():
            for claim in claims:
                self._database.write(
                    "INSERT INTO claims (user, public, serial, expires, made, state) VALUES (?,?,?,?,?,'open')",
                    *claim,
                    now,
                )

    def claim(self, user: str) -> ClaimRow | None:
        """A claim by its user's name."""
        row = self._database.one(f"{_CLAIM} WHERE user = ?", user)
        return None if row is None else ClaimRow(*row)

    def claims(self, *states: State) -> list[ClaimRow]:
        """Claims in one of these states, the oldest first."""
        marks = ",".join("?" * len(states))
        rows = self._database.all(f"{_CLAIM} WHERE state IN ({marks}) ORDER BY asked, made, user", *states)
        return [ClaimRow(*row) for row in rows]

    def bind(self, user: str, client: str, device: bytes, state: State, now: float) -> None:
        """A device has asked with a claim, which is its own from now on."""
        self._database.write(
            "UPDATE claims SET client = ?, device = ?, state = ?, asked = coalesce(asked, ?) WHERE user = ?",
            client,
            device,
            state,
            now,
            user,
        )

    def decide(self, user: str, *, approved: bool, detail: str = "") -> bool:
        """Approve or refuse what a claim waits for; false where it does not wait."""
        state = "approved" if approved else "refused"
        return (
            self._database.write(
                "UPDATE claims SET state = ?, detail = ? WHERE user = ? AND state = 'pending'", state, detail, user
            )
            > 0
        )

    def withdraw(self, user: str, now: float) -> bool:
        """A claim and its certificate are good for nothing any more; false where there is no such claim.

        What was issued with it stays, and so does that it was.
        """
        with self.group():
            self._database.write(
                "INSERT OR IGNORE INTO revoked SELECT serial, ?, expires FROM claims WHERE user = ?", now, user
            )
            detail = "the claim was withdrawn"
            self._database.write(
                "UPDATE claims SET state = 'refused', detail = ? WHERE user = ? AND state != 'issued'", detail, user
            )
            return self.claim(user) is not None


def standing(path: Path, now: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As `Registry.standing`, of the registry in a file; nobody where there is none, for it may be elsewhere.

    Raises:
        LedgerError: the file is damaged.
    """
    if not path.exists():
        return (), ()
    with Registry.open(path) as registry:
        return registry.standing(now)
