import math
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from broker_server.database import APPLICATION, Lock
from broker_server.ledger import BEST, Ledger
from broker_server.ledger_schema import MIGRATIONS
from broker_server.records import Misconduct, Round, Task, Version
from edge_client.errors import LedgerError


def open_ledger(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.db", federation="f", bundle="ab" * 32)


def task(number: int = 1, *, epoch: int = 1, cohort: tuple[str, ...] = ("a", "b")) -> Task:
    return Task(
        epoch=epoch, task=number, round=1, kind="train", version=0, cohort=cohort, plan=b"plan", opened=1_700_000_000.5
    )


def version(number: int) -> Version:
    return Version(version=number, round=number, state=b"s%d" % number, remainder=b"r", optimizer=b"o")


@pytest.fixture
def ledger(tmp_path):
    with open_ledger(tmp_path) as opened:
        yield opened


def test_epochs_grow_with_every_start(tmp_path):
    before, epochs = int(time.time()), []
    for _ in range(3):
        with open_ledger(tmp_path) as ledger:
            epochs.append(ledger.new_epoch())
    assert epochs == [epochs[0], epochs[0] + 1, epochs[0] + 2]
    assert before <= epochs[0] <= time.time()


def test_a_new_ledger_goes_on_above_the_epochs_of_an_old_one(tmp_path, monkeypatch):
    """Clients that have seen the old one's would take a lower epoch for a server of the past."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    with open_ledger(tmp_path / "old") as ledger:
        old = [ledger.new_epoch() for _ in range(5)][-1]
    monkeypatch.setattr(time, "time", lambda: 2000.0)
    with open_ledger(tmp_path / "new") as ledger:
        assert ledger.new_epoch() > old


def test_void_are_those_whose_last_update_is_for_a_void_task(tmp_path):
    with open_ledger(tmp_path) as ledger:
        for number, clients, outcome in ((1, "ab", "void"), (2, "bc", "done"), (3, "c", None)):
            ledger.open_task(task(number))
            for client in clients:
                ledger.record(1, number, client, b"update", 10)
            if outcome:
                ledger.close_task(1, number, outcome)
        assert ledger.voids() == {"a": (1, 1)}
        ledger.close_task(1, 3, "void")
    with open_ledger(tmp_path) as ledger:
        assert ledger.voids() == {"a": (1, 1), "c": (1, 3)}


def test_a_task_survives_reopening_with_its_cohort_in_order(tmp_path):
    with open_ledger(tmp_path) as ledger:
        ledger.open_task(task(cohort=("z", "a")))
        ledger.invite(1, 1, ["m", "a"])
    with open_ledger(tmp_path) as ledger:
        assert ledger.open_tasks() == [task(cohort=("z", "a", "m"))]
        assert ledger.last_task() == 1
        assert ledger.outcome(1, 1) is None
        ledger.close_task(1, 1, "void")
        assert ledger.open_tasks() == []
        assert ledger.outcome(1, 1) == "void"
        with pytest.raises(LedgerError, match="task 1/1 is not open"):
            ledger.close_task(1, 1, "done")


def test_a_task_number_is_used_once(ledger):
    ledger.open_task(task())
    with pytest.raises(LedgerError, match="contradicts"):
        ledger.open_task(task())
    assert ledger.open_tasks() == [task()]


def test_an_update_is_recorded_exactly_once(ledger):
    ledger.open_task(task())
    assert ledger.record(1, 1, "b", b"first", 10)
    assert not ledger.record(1, 1, "b", b"second", 99)
    assert ledger.record(1, 1, "a", b"other", 20)
    assert list(ledger.updates()) == [((1, 1), "b", 10, b"first"), ((1, 1), "a", 20, b"other")]
    assert ledger.recorded(1, 1) == ["b", "a"]


def test_updates_stream_while_others_are_recorded(ledger):
    ledger.open_task(task())
    ledger.record(1, 1, "a", b"a", 1)
    stream = ledger.updates()
    assert next(stream) == ((1, 1), "a", 1, b"a")
    ledger.record(1, 1, "b", b"b", 1)
    assert list(ledger.updates()) == [((1, 1), "a", 1, b"a"), ((1, 1), "b", 1, b"b")]


@pytest.mark.parametrize("end", ["never opened", "closed"])
def test_an_update_that_would_not_count_is_not_recorded(ledger, end):
    if end == "closed":
        ledger.open_task(task())
        ledger.close_task(1, 1, "done")
    with pytest.raises(LedgerError, match="task 1/1 is not open"):
        ledger.record(1, 1, "a", b"data", 1)


def test_closing_drops_the_data_and_keeps_size_and_hash(ledger, tmp_path):
    ledger.open_task(task())
    ledger.record(1, 1, "a", b"12345", 1)
    ledger.close_task(1, 1, "done")
    assert list(ledger.updates()) == []
    assert ledger.recorded(1, 1) == ["a"]
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        assert raw.execute("SELECT size, length(sha256), data FROM updates").fetchone() == (5, 32, None)


def rows(folder, table):
    with sqlite3.connect(folder / "ledger.db") as raw:
        return raw.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_a_year_of_rounds_leaves_the_last_ones(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("broker_server.ledger.REMEMBERED", 20)
    for number in range(1, 101):
        ledger.open_task(task(number, epoch=1 + number // 40))
        ledger.record(1 + number // 40, number, "a", b"data", 1)
        ledger.close_task(1 + number // 40, number, "void" if number % 3 else "done")
        assert ledger.last_task() == number
    assert (rows(tmp_path, "tasks"), rows(tmp_path, "members"), rows(tmp_path, "updates")) == (11, 22, 11)
    assert [number for number in range(1, 101) if ledger.recorded(1 + number // 40, number)] == list(range(90, 101))
    assert [ledger.outcome(3, number) for number in (89, 90, 91)] == [None, "done", "void"]


def test_a_task_that_stays_open_is_never_forgotten(ledger, monkeypatch):
    """Where there are no rounds, a client's task may be open while others come and go."""
    monkeypatch.setattr("broker_server.ledger.REMEMBERED", 3)
    for number in (1, 2):
        ledger.open_task(task(number, cohort=("slow",)))
    ledger.record(1, 2, "slow", b"kept", 5)
    for number in range(3, 30):
        ledger.open_task(task(number, cohort=("quick",)))
        ledger.record(1, number, "quick", b"data", 1)
        ledger.close_task(1, number, "done")
    assert ledger.open_tasks() == [task(1, cohort=("slow",)), task(2, cohort=("slow",))]
    assert list(ledger.updates()) == [((1, 2), "slow", 5, b"kept")]
    assert ledger.record(1, 1, "slow", b"at last", 1)
    ledger.close_task(1, 1, "done")
    assert (ledger.recorded(1, 1), ledger.recorded(1, 2)) == ([], ["slow"])


def test_an_update_for_a_forgotten_task_is_not_recorded_and_its_number_not_used_again(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("broker_server.ledger.REMEMBERED", 4)
    for number in range(1, 11):
        ledger.open_task(task(number))
        ledger.record(1, number, "a", b"data", 1)
        ledger.publish(version(number), closes=[(1, number)])
    for number in range(1, 11):
        with pytest.raises(LedgerError, match=f"task 1/{number} is not open"):
            ledger.record(1, number, "a", b"data", 1)
    assert list(ledger.updates()) == []
    ledger.close()
    with open_ledger(tmp_path) as again:
        assert again.last_task() == 10


def test_what_a_ledger_grew_to_before_is_forgotten_bit_by_bit(ledger, tmp_path, monkeypatch):
    for number in range(1, 301):
        ledger.open_task(task(number, cohort=("a",)))
        ledger.close_task(1, number, "void")
    monkeypatch.setattr("broker_server.ledger.REMEMBERED", 10)
    left = []
    for number in range(301, 305):
        ledger.open_task(task(number, cohort=("a",)))
        ledger.close_task(1, number, "void")
        left.append(rows(tmp_path, "tasks"))
    assert left == [201, 102, 11, 11]


def test_publishing_closes_the_task_in_the_same_transaction(ledger):
    ledger.publish(version(0))
    ledger.open_task(task())
    with pytest.raises(LedgerError, match="contradicts"):
        ledger.publish(version(0), closes=[(1, 1)])
    assert ledger.open_tasks() == [task()], "the version failed, so the task stays open"
    ledger.publish(version(1), closes=[(1, 1)])
    assert ledger.open_tasks() == []
    with pytest.raises(LedgerError, match="not open"):
        ledger.publish(version(2), closes=[(1, 1)])
    assert ledger.latest() == version(1)
    assert ledger.version(0) == version(0)
    assert ledger.version(7) is None


def test_pruning_keeps_the_asked_the_best_and_the_latest(ledger):
    for number in range(6):
        ledger.publish(version(number))
    ledger.put(BEST, "2")
    ledger.prune([0])
    assert [number for number, _, kept in ledger.versions() if kept] == [0, 2, 5]
    assert ledger.version(1) == Version(version=1, round=1, state=b"")
    # What only a next version needs is the latest's.
    assert ledger.version(2) == msgspec.structs.replace(version(2), remainder=b"", optimizer=b"")
    assert ledger.version(5) == version(5)


def test_a_finished_round_replaces_what_was_known_of_it(ledger):
    known = Round(round=1, version=1, clients=3, samples=30, seconds=0.0, bytes_up=0, bytes_down=0)
    ledger.finish_round(known)
    metrics = {"accuracy": 0.5, "loss": math.nan}
    ledger.finish_round(
        Round(round=1, version=1, clients=3, samples=30, seconds=1.5, bytes_up=2**40, bytes_down=7, metrics=metrics)
    )
    (found,) = ledger.rounds()
    assert (found.bytes_up, found.seconds, found.metrics["accuracy"]) == (2**40, 1.5, 0.5)
    assert math.isnan(found.metrics["loss"])


def test_a_round_is_unfinished_until_its_evaluation_is_there(ledger):
    assert ledger.unfinished() is None
    results = [Round(round=n, version=n, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0) for n in (1, 2)]
    ledger.finish_round(results[0], finished=False)
    assert ledger.unfinished() == 1
    ledger.finish_round(results[0])
    assert ledger.unfinished() is None
    ledger.finish_round(results[1], finished=False)
    assert ledger.unfinished() == 2
    assert ledger.rounds() == results


def older(path, schema):
    """A ledger as a fedge of an older schema left it."""
    raw = sqlite3.connect(path)
    for migration in MIGRATIONS[:schema]:
        for statement in migration:
            raw.execute(statement)
    columns = "round, version, clients, samples, seconds, bytes_up, bytes_down, metrics"
    for number in (1, 2):
        raw.execute(f"INSERT INTO rounds ({columns}) VALUES (?, ?, 1, 1, 0.0, 0, 0, '{{}}')", (number, number))
    raw.execute("INSERT INTO tasks VALUES (1, 4, 2, 'evaluate', 2, x'', 0.0, NULL)")
    raw.execute("INSERT INTO members VALUES (NULL, 1, 4, 'a')")
    raw.execute("INSERT INTO updates VALUES (NULL, 1, 4, 'a', 7, 3, x'00', x'616263')")
    raw.execute("INSERT INTO versions (version, round, state, remainder, optimizer) VALUES (2, 2, x'01', x'', x'')")
    if schema > 1:
        raw.execute("UPDATE rounds SET finished = 0 WHERE round = 2")
    raw.execute(f"PRAGMA application_id = {APPLICATION}")
    raw.execute(f"PRAGMA user_version = {schema}")
    raw.commit()
    raw.close()


@pytest.mark.parametrize("schema", range(1, len(MIGRATIONS)))
def test_a_ledger_of_an_older_schema_migrates_with_all_that_it_holds_and_a_copy_is_kept(tmp_path, schema):
    older(tmp_path / "ledger.db", schema)
    with open_ledger(tmp_path) as ledger:
        assert ledger.unfinished() == 2
        assert [done.round for done in ledger.rounds()] == [1, 2]
        assert [(task.epoch, task.task, task.cohort) for task in ledger.open_tasks()] == [(1, 4, ("a",))]
        assert list(ledger.updates()) == [((1, 4), "a", 7, b"abc")]
        assert ledger.latest().state == b"\x01"
        assert ledger.record(1, 4, "b", b"data", 1)
    copy = sqlite3.connect(tmp_path / f"ledger.db.schema-{schema}")
    assert copy.execute("PRAGMA user_version").fetchone() == (schema,)
    assert copy.execute("SELECT client FROM updates").fetchall() == [("a",)]
    copy.close()


def test_a_new_ledger_and_one_of_this_schema_are_not_copied(tmp_path):
    for _ in range(2):
        open_ledger(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir() if "schema" in path.name] == []


def test_a_ledger_that_cannot_be_copied_stays_as_it_is(tmp_path):
    older(tmp_path / "ledger.db", 1)
    (tmp_path / "ledger.db.schema-1").mkdir()
    (tmp_path / "ledger.db.schema-1" / "in the way").touch()
    with pytest.raises(LedgerError, match=r"ledger.db.schema-1: .*; the ledger is not migrated without a copy"):
        open_ledger(tmp_path)
    raw = sqlite3.connect(tmp_path / "ledger.db")
    assert raw.execute("PRAGMA user_version").fetchone() == (1,)
    raw.close()


def test_a_full_disk_says_so_and_takes_nothing_with_it(ledger):
    epoch = ledger.new_epoch()
    ledger.open_task(task(epoch=epoch))
    ledger.record(epoch, 1, "a", b"first", 1)
    connection = ledger._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 3}")

    def both():
        with ledger.group():
            ledger.record(epoch, 1, "b", b"small", 1)
            ledger.record(epoch, 1, "c", bytes(100_000), 1)

    with pytest.raises(LedgerError, match=r"full; check the disk's free space"):
        both()
    assert ledger.recorded(epoch, 1) == ["a"]
    connection.execute("PRAGMA max_page_count = 1000000")
    assert ledger.record(epoch, 1, "c", bytes(100_000), 1)
    assert [client for _, client, _, _ in ledger.updates()] == ["a", "c"]


def test_retained_topics_and_notes(ledger):
    ledger.retain(["b", "a", "b"])
    ledger.retain(["c"])
    ledger.released(["a", "unknown"])
    assert ledger.retained() == ["b", "c"]
    assert ledger.get("seconds") is None
    ledger.put("seconds", "1.5")
    ledger.put("seconds", "2.5")
    assert ledger.get("seconds") == "2.5"


def test_a_group_is_one_commit(ledger, tmp_path):
    ledger.open_task(task())
    with Ledger.read(tmp_path / "ledger.db") as reader:
        with ledger.group():
            ledger.record(1, 1, "a", b"a", 1)
            ledger.record(1, 1, "b", b"b", 1)
            assert reader.recorded(1, 1) == []
        assert reader.recorded(1, 1) == ["a", "b"]


def test_a_group_that_fails_leaves_nothing(ledger):
    def twice() -> None:
        with ledger.group():
            ledger.open_task(task())
            ledger.open_task(task())

    with pytest.raises(LedgerError):
        twice()
    assert ledger.open_tasks() == []
    ledger.open_task(task(1))


def test_a_caught_failure_inside_a_group_undoes_only_itself(ledger):
    ledger.publish(version(0))
    with ledger.group():
        ledger.open_task(task())
        with pytest.raises(LedgerError):
            ledger.publish(version(0), closes=[(1, 1)])
    assert ledger.open_tasks() == [task()]


def test_a_lock_taken_before_serves_the_ledger_and_stays_the_callers(tmp_path):
    with Lock(tmp_path / "ledger.db") as lock:
        Ledger.open(tmp_path / "ledger.db", federation="f", bundle="ab", lock=lock).close()
        with pytest.raises(LedgerError, match="another server has it open"):
            Ledger.open(tmp_path / "ledger.db", federation="f", bundle="ab")
    Ledger.open(tmp_path / "ledger.db", federation="f", bundle="ab").close()


def test_a_second_server_is_refused_and_a_reader_is_not(ledger, tmp_path):
    with pytest.raises(LedgerError, match="another server has it open"):
        open_ledger(tmp_path)
    with Ledger.read(tmp_path / "ledger.db") as reader:
        assert reader.open_tasks() == []
        with pytest.raises(LedgerError, match="readonly"):
            reader.put("key", "value")
    ledger.close()
    ledger.close()
    open_ledger(tmp_path).close()


@pytest.mark.parametrize("other", [{"federation": "g"}, {"bundle": "cd" * 32}])
def test_another_federation_or_bundle_is_refused(tmp_path, other):
    open_ledger(tmp_path).close()
    with pytest.raises(LedgerError, match=r"belongs to .* set federation\.state to a new folder"):
        Ledger.open(tmp_path / "ledger.db", **{"federation": "f", "bundle": "ab" * 32, **other})
    open_ledger(tmp_path).close()


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute(f"PRAGMA application_id = {APPLICATION}")
        raw.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE addresses (name)")


def _text(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to be taken for one " * 40)


def _torn(path: Path) -> None:
    with Ledger.open(path, federation="f", bundle="ab" * 32) as ledger:
        ledger.publish(Version(version=0, round=0, state=bytes(200_000)))
    data = bytearray(path.read_bytes())
    data[4096 : 4096 * 12] = b"\xa5" * (4096 * 11)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_newer, "newer fedge"), (_foreign, "another program"), (_text, "is damaged"), (_torn, "is damaged")],
)
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path, damage, message):
    path = tmp_path / "ledger.db"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=message) as caught:
        open_ledger(tmp_path)
    assert str(path) in str(caught.value)
    if damage is not _torn:
        assert path.read_bytes() == before


def test_reading_needs_a_ledger(tmp_path):
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger.read(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(LedgerError, match="cannot be created"):
        Ledger.open(tmp_path / "state" / "ledger.db", federation="f", bundle="ab" * 32)


_RECORDER = """
import sys
from broker_server.records import Task
from broker_server.ledger import Ledger
ledger = Ledger.open(sys.argv[1], federation="f", bundle="ab" * 32)
epoch = ledger.new_epoch()
ledger.open_task(Task(epoch=epoch, task=1, round=1, kind="train", version=0, cohort=(), plan=b"", opened=0.0))
number = 0
while True:
    with ledger.group():
        names = [f"client-{number + extra}" for extra in range(3)]
        for name in names:
            ledger.record(epoch, 1, name, name.encode() * 100, 1)
    number += 3
    print(*names, flush=True)
"""


def test_kill_9_loses_nothing_that_got_a_receipt(tmp_path):
    path = tmp_path / "ledger.db"
    for size in (20, 40, 60):
        server = subprocess.Popen([sys.executable, "-c", _RECORDER, str(path)], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        receipts = [server.stdout.readline() for _ in range(size)]
        server.send_signal(signal.SIGKILL)
        receipts += [line for line in server.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        server.wait()
        server.stdout.close()
        promised = " ".join(receipts).split()
        with open_ledger(tmp_path) as ledger:
            epoch = int(ledger.get("epoch") or 0)
            recorded = ledger.recorded(epoch, 1)
            assert recorded[: len(promised)] == promised
            assert len(recorded) % 3 == 0, "a group is whole or absent"
            assert all(data == client.encode() * 100 for _, client, _, data in ledger.updates())


def test_misconduct_is_kept_and_the_oldest_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("broker_server.ledger._MISCONDUCT_KEPT", 3)
    faults = [Misconduct(float(n), f"x{n}", "muted" if n % 2 else "twin", "it floods", 60.0) for n in range(5)]
    with Ledger.open(tmp_path / "ledger.db", federation="f", bundle="b") as ledger:
        for fault in faults:
            ledger.accuse(fault)
    with Ledger.read(tmp_path / "ledger.db") as ledger:
        assert ledger.misconduct() == faults[2:]
