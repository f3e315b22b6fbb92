"""What the operator wants of the fleet, as it reaches the coordinator: who pauses, what is published, what is said."""

import pytest

from broker_server import events as e
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import Desk, invited, of, settings, told

ROUND = {"cohort": 2, "clients": 2, "minimum": 1, "deadline": 60.0}
BUFFERED = {"mode": "buffered", "concurrency": 2, "buffer": 2, "clients": 2}
MODES = pytest.mark.parametrize("rounds", [ROUND, BUFFERED], ids=["rounds", "buffered"])
WHEEL = m.BlobRef(bytes(range(32)), 2500, 1024)


def desk(rounds, **more):
    return Desk(settings(round=rounds, stop={"rounds": 100}, **more))


@MODES
def test_who_pauses_is_not_asked_and_is_asked_again_when_it_goes_on(rounds):
    table = desk(rounds)
    table.feed(e.Steered(frozenset("c")))
    assert set(invited(table.hello("c", "a", "b"))) == {"a", "b"}
    for _ in range(3):
        assert "c" not in {name for client in ("a", "b") for name in invited(round_of(table, client))}
    assert table.coordinator.clients == 2
    table.feed(e.Steered(frozenset(("a", "b"))))
    assert table.coordinator.clients == 1
    actions = [action for client in ("a", "b") for action in round_of(table, client)]
    assert not {"a", "b"} & set(invited(actions))
    actions = table.feed(e.Steered())
    assert table.coordinator.clients == 3
    for client in ("a", "b", "c"):
        actions += round_of(table, client)
    assert {"a", "b"} & set(invited(actions))


def round_of(table, client):
    """A client ends the task that it has, where it has one."""
    for identity, task in list(table.paper.tasks.items()):
        open_ = identity not in table.paper.outcomes and client not in table.paper.updates[identity]
        if open_ and client in task.cohort:
            return table.upload(client, identity=identity)
    return []


@MODES
def test_nothing_is_asked_of_anybody_where_everybody_pauses(rounds):
    table = desk(rounds)
    table.feed(e.Steered(everyone=True))
    assert invited(table.hello("a", "b", "c")) == {}
    assert invited(table.wait(500)) == {}
    assert set(invited(table.feed(e.Steered()))) <= {"a", "b", "c"}
    assert table.paper.tasks


@MODES
def test_the_update_of_one_that_pauses_at_a_task_counts(rounds):
    table = desk(rounds)
    table.hello("a", "b")
    table.feed(e.Steered(frozenset("a")))
    round_of(table, "a")
    round_of(table, "b")
    assert table.paper.sums == [20]


@MODES
def test_who_says_that_it_may_train_pauses_all_the_same_and_who_says_that_it_may_not_is_not_woken(rounds):
    table = desk(rounds)
    table.feed(e.Steered(frozenset("a")))
    table.hello("a", available=True)
    table.hello("b", available=False)
    assert table.coordinator.clients == 0
    table.feed(e.Steered())
    assert table.coordinator.clients == 1


@MODES
def test_what_a_device_says_of_itself_is_handed_on(rounds):
    table = desk(rounds)
    condition = m.Condition(degrees=40.0)
    (seen,) = of(table.hello("a", condition=condition, available=False), e.Seen)
    assert (seen.client, seen.hello.condition, seen.hello.available) == ("a", condition, False)


@MODES
def test_a_release_is_said_to_one_client(rounds):
    table = desk(rounds)
    release = m.Release(b"what it is", bytes(64))
    assert told(table.feed(e.Say("a", release)), "a") == [release]


@MODES
def test_files_are_published_again_on_each_connection_and_on_demand_and_cleared_when_they_are_over(rounds):
    table = desk(rounds)
    table.paper.blobs[WHEEL.sha256] = bytes(2500)
    assert table.feed(e.Steered(files=((WHEEL, "/there"),))) == [e.Adopt(WHEEL, "/there"), e.Spread(WHEEL)]
    assert table.feed(e.Steered(frozenset("x"), files=((WHEEL, "/there"),))) == []
    table.feed(e.Disconnected())
    assert e.Spread(WHEEL) in table.feed(e.Connected())
    table.hello("a")
    assert table.say("a", m.Missing(WHEEL.sha256, (0, 2))) == [e.Spread(WHEEL, (0, 2))]
    table.feed(e.Disconnected())
    other = transfer.refer(bytes(3000), chunk=1024, inline=0)
    table.paper.blobs[other.sha256] = bytes(3000)
    # Without a connection it is published once there is one.
    assert table.feed(e.Steered(files=((other, "/other"),))) == [e.Adopt(other, "/other"), e.Sweep(WHEEL)]
    assert of(table.feed(e.Connected()), e.Spread)[:1] == [e.Spread(other)]
    assert table.say("a", m.Missing(WHEEL.sha256, (0,))) == []
