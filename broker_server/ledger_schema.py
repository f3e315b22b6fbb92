"""The ledger's tables. Schema n is what the first n migrations make; a released migration never changes."""

from broker_server.database import Migrations

MIGRATIONS: Migrations = (
    (
        "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE tasks (
            epoch INTEGER NOT NULL,
            task INTEGER NOT NULL,
            round INTEGER NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('train', 'evaluate')),
            version INTEGER NOT NULL,
            plan BLOB NOT NULL,
            opened REAL NOT NULL,
            outcome TEXT CHECK (outcome IN ('done', 'void')),
            PRIMARY KEY (epoch, task)
        )""",
        "CREATE INDEX tasks_open ON tasks (epoch, task) WHERE outcome IS NULL",
        """CREATE TABLE members (
            id INTEGER PRIMARY KEY,
            epoch INTEGER NOT NULL,
            task INTEGER NOT NULL,
            client TEXT NOT NULL,
            UNIQUE (epoch, task, client),
            FOREIGN KEY (epoch, task) REFERENCES tasks
        )""",
        # AUTOINCREMENT: ids only grow, so their order is the order of recording, which replays sum in.
        """CREATE TABLE updates (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            epoch INTEGER NOT NULL,
            task INTEGER NOT NULL,
            client TEXT NOT NULL,
            samples INTEGER NOT NULL,
            size INTEGER NOT NULL,
            sha256 BLOB NOT NULL,
            data BLOB,
            UNIQUE (epoch, task, client),
            FOREIGN KEY (epoch, task) REFERENCES tasks
        )""",
        """CREATE TABLE versions (
            version INTEGER PRIMARY KEY,
            round INTEGER NOT NULL,
            state BLOB NOT NULL,
            remainder BLOB NOT NULL,
            optimizer BLOB NOT NULL
        )""",
        """CREATE TABLE rounds (
            round INTEGER PRIMARY KEY,
            version INTEGER NOT NULL,
            clients INTEGER NOT NULL,
            samples INTEGER NOT NULL,
            seconds REAL NOT NULL,
            bytes_up INTEGER NOT NULL,
            bytes_down INTEGER NOT NULL,
            metrics TEXT NOT NULL
        )""",
        "CREATE TABLE retained (id INTEGER PRIMARY KEY, topic TEXT NOT NULL UNIQUE)",
    ),
    (
        "ALTER TABLE rounds ADD COLUMN finished INTEGER NOT NULL DEFAULT 1",
        "UPDATE rounds SET finished = 0 WHERE round IN (SELECT round FROM tasks WHERE outcome IS NULL)",
    ),
    ("ALTER TABLE versions ADD COLUMN pace REAL NOT NULL DEFAULT 0",),
    ("ALTER TABLE versions ADD COLUMN anchor INTEGER NOT NULL DEFAULT 0",),
    (
        """CREATE TABLE misconduct (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            time REAL NOT NULL,
            client TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('muted', 'twin')),
            reason TEXT NOT NULL,
            seconds REAL NOT NULL
        )""",
    ),
    # What clients told of their data in evaluations, as JSON.
    ("CREATE TABLE findings (round INTEGER PRIMARY KEY, data BLOB NOT NULL)",),
)
