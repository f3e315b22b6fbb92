"""Server, clients and broker killed at random moments of one run: nothing is lost and nothing counts twice.

``FEDGE_KILLS_ROUNDS=50`` takes the size that the design promises, ``FEDGE_KILLS_SEED`` other dice. ``make prove-kills``
takes fresh ones, and writes a report.
"""

import json
import os
import shutil
import sqlite3

import pytest

from edge_client.bundle import Bundle
from tests.kills.account import settle
from tests.kills.journal import FILE
from tests.kills.run import SAMPLES, carry_out
from tests.mosquitto import needs_mosquitto

ROUNDS = int(os.environ.get("FEDGE_KILLS_ROUNDS", "12"))
KILLS, BROKERS = ROUNDS * 2 // 5, max(1, ROUNDS // 8)
pytestmark = needs_mosquitto


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and what came of it."""
    folder, seed = tmp_path_factory.mktemp("kills") / "run", int(os.environ.get("FEDGE_KILLS_SEED", "1"))
    return folder, carry_out(folder, seed, ROUNDS, KILLS, BROKERS)


def test_nothing_is_lost_and_nothing_counts_twice(run):
    _, result = run
    account = result.account
    assert account.clean, account
    assert account.rounds == ROUNDS
    # A federation needs two updates for a round, and has mostly three.
    assert account.recorded > 2 * ROUNDS
    assert result.kills["server"] + result.kills["client"] > KILLS / 2
    assert result.kills["broker"] == BROKERS


@pytest.fixture
def tampered(run, tmp_path):
    """The account of a copy of the run, after some SQL on the ledger or a word in a client's journal."""
    folder, copy = run[0], tmp_path / "copy"
    shutil.copytree(folder / "state", copy / "state")
    shutil.copytree(folder / "journals", copy / "journals")

    def account(statement="", told=None):
        if statement:
            connection = sqlite3.connect(copy / "state" / "ledger.db")
            assert connection.execute(statement).rowcount > 0
            connection.commit()
            connection.close()
        if told is not None:
            path = copy / "journals" / "c1" / FILE
            facts = [json.loads(line) for line in path.read_text().splitlines()]
            word = next(fact for fact in facts if fact["what"] == "told" and fact["recorded"] is not told)
            path.write_text(path.read_text() + json.dumps(word | {"recorded": told}) + "\n")
        journals = {client: copy / "journals" / client for client in SAMPLES}
        bundle = Bundle.open(folder / "toy.fedge")
        return settle(bundle, copy / "state" / "ledger.db", journals, SAMPLES)

    return account


LAST = "(SELECT max(id) FROM updates JOIN tasks USING (epoch, task) WHERE kind = 'train' AND outcome = 'done')"


def test_the_account_misses_an_update_that_is_gone(tampered):
    found = tampered(f"DELETE FROM updates WHERE id = {LAST}")
    assert len(found.lost) == 1
    assert any("says" in line for line in found.wrong)
    assert any("away from" in line for line in found.wrong)


def test_the_account_sees_an_update_that_counts_twice(tampered):
    found = tampered(
        "INSERT INTO updates SELECT NULL, (SELECT epoch FROM tasks WHERE round = 2 AND kind = 'train' AND "
        "outcome = 'done'), (SELECT task FROM tasks WHERE round = 2 AND kind = 'train' AND outcome = 'done'), "
        f"'x', samples, size, sha256, data FROM updates WHERE id = {LAST}"
    )
    assert len(found.doubled) == 1
    assert any("never made" in line for line in found.wrong)


def test_the_account_sees_a_weight_that_is_not_the_client_s(tampered):
    found = tampered(f"UPDATE updates SET samples = samples + 1 WHERE id = {LAST}")
    assert any("weighs" in line for line in found.wrong)


def test_the_account_sees_a_task_that_two_rounds_are_made_of(tampered):
    assert tampered("UPDATE tasks SET round = 2 WHERE round = 3 AND outcome = 'done'").wrong


def test_the_account_sees_a_model_that_is_not_the_sum(tampered):
    found = tampered(
        "UPDATE versions SET remainder = zeroblob(length(remainder)), state = "
        "(SELECT state FROM versions AS other WHERE other.version < versions.version AND length(other.state) > 0 "
        "ORDER BY other.version DESC LIMIT 1) WHERE version = (SELECT max(version) FROM versions)"
    )
    assert any("away from" in line for line in found.wrong)


def test_the_account_sees_a_client_that_takes_what_counts_for_lost(tampered):
    assert len(tampered(told=False).doubled) == 1
