"""Updates under way on the server's disk: they outlive the server, their task does not outlive them."""

import random

import pytest

from broker_server.records import Task
from broker_server.spool import Spool
from edge_client.errors import LedgerError, WireError
from edge_client.wire.transfer import piece, refer

DATA = random.Random(5).randbytes(3500)
REF = refer(DATA, chunk=1024, inline=0)
TASK = Task(epoch=1, task=2, round=1, kind="train", version=0, cohort=("a", "b.c-d"), plan=b"", opened=0.0)
IDENTITY = 1, 2


def spool(folder, task=TASK):
    made = Spool(folder / "uploads", limit=5000)
    return made, made.restore((task,))


def keep(made, client, indices, data=DATA, identity=IDENTITY):
    for index in indices:
        made.keep(identity, client, REF, index, piece(data, REF, index))


def test_what_has_come_is_there_after_a_restart(tmp_path):
    keep(spool(tmp_path)[0], "b.c-d", (3, 0))
    made, found = spool(tmp_path)
    assert {client: checklist.missing() for client, checklist in found.items()} == {"b.c-d": (1, 2)}
    for index in (1, 2):
        found["b.c-d"].mark(index, 1024)  # as the coordinator does before the chunk is written
    keep(made, "b.c-d", (1, 2))
    assert made.take(IDENTITY, "b.c-d") == DATA
    assert made.take(IDENTITY, "b.c-d") == DATA  # it stays until the ledger has it
    made.discard(IDENTITY, "b.c-d")
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize(
    ("client", "identity"), [("a", (1, 1)), ("a", (0, 2)), ("stranger", IDENTITY)], ids=["task", "epoch", "member"]
)
def test_what_came_for_others_is_removed_at_the_start(tmp_path, client, identity):
    keep(spool(tmp_path)[0], client, (0,), identity=identity)
    assert spool(tmp_path)[1] == {}
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_closed_task_takes_its_uploads_with_it(tmp_path):
    made, _ = spool(tmp_path)
    for client in "ab":
        keep(made, client, (0,))
    keep(made, "a", (0,), identity=(1, 3))
    made.discard(IDENTITY)
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["1-3-a.part"]


def test_bytes_that_were_not_announced_are_refused(tmp_path):
    made, _ = spool(tmp_path)
    keep(made, "a", range(4), data=bytes(3500))
    with pytest.raises(WireError, match="SHA-256"):
        made.take(IDENTITY, "a")


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "uploads").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"updates under way: .*uploads"):
        spool(tmp_path)
