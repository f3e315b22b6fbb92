"""The file in which a fleet is remembered, beside a server and without one."""

import pytest

from broker_server.inventory import FILE, Device, Inventory, Said
from broker_server.rollout import Rollout, Seat
from edge_client.errors import LedgerError
from edge_client.wire import messages as m

SAID = Said(3, 40, True, "0.1.0", m.Condition(degrees=50.0, disk=2**33, progress=m.Progress("0.2.0", "back", "deaf")))
ROLLOUT = Rollout("0.2.0", m.Release(b"record", bytes(64)), ("1", "100%"), 0.1, 60.0)


@pytest.fixture
def two(tmp_path):
    """The server's and a command's."""
    with Inventory.open(tmp_path / "state") as one, Inventory.open(tmp_path / "state") as other:
        yield one, other


def test_what_devices_say_and_what_the_operator_wants_do_not_overwrite_each_other(two):
    server, command = two
    command.pause(["a", "b"], paused=True)
    command.retire("b", 5.0)
    server.saw({"a": (10.0, SAID), "c": (11.0, SAID)})
    command.retire("b", 6.0)  # it was already
    assert command.devices() == {
        "a": Device("a", 10.0, SAID, True, None),
        "b": Device("b", 0.0, None, True, 5.0),
        "c": Device("c", 11.0, SAID, False, None),
    }
    command.pause(["a"], paused=False)
    server.saw({"a": (12.0, SAID)})
    assert server.devices()["a"] == Device("a", 12.0, SAID, False, None)


def test_a_change_by_another_is_noticed_and_ones_own_is_not(two):
    server, command = two
    before = server.revision()
    server.saw({"a": (10.0, SAID)})
    assert server.revision() == before
    command.pause(["a"], paused=True)
    assert server.revision() != before


def test_all_may_pause_and_go_on_together(two):
    server, command = two
    command.pause(["a"], paused=True)
    command.pause_all(paused=True)
    command.pause_all(paused=True)
    assert server.everyone
    command.pause_all(paused=False)
    assert not server.everyone
    assert not server.devices()["a"].paused


def test_a_rollout_is_gone_on_with_until_another_one_takes_its_place(two):
    server, command = two
    number = command.begin(ROLLOUT, 1.0)
    assert server.latest() == (number, ROLLOUT)
    server.keep(number, ROLLOUT, {"a": Seat(0, "asked", 2.0)})
    server.keep(number, ROLLOUT, {"a": Seat(0, "healthy", 3.0), "b": Seat(1, "asked", 3.0)})
    assert command.seats(number) == {"a": Seat(0, "healthy", 3.0), "b": Seat(1, "asked", 3.0)}
    newer = Rollout("0.3.0", ROLLOUT.release, ("100%",), 0.1, 60.0)
    second = command.begin(newer, 4.0)
    assert [one.state for one in command.rollouts().values()] == ["stopped", "running"]
    assert command.rollouts()[number].reason == "0.3.0 followed"
    assert server.latest() == (second, newer)
    server.keep(number, ROLLOUT)  # what it had in hand when the operator stopped it
    assert command.rollouts()[number].state == "stopped"


def test_what_an_older_server_wrote_and_cannot_be_understood_is_said_again(two, tmp_path):
    server, command = two
    server.saw({"a": (10.0, SAID)})
    command._database.write("UPDATE devices SET said = x'c1'")
    assert server.devices()["a"] == Device("a", 10.0, None)


def test_a_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database, and long enough to be looked at" * 10)
    with pytest.raises(LedgerError, match=FILE):
        Inventory.open(tmp_path)
