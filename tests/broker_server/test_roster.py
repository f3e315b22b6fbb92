import msgspec
import pytest

from broker_server.roster import Roster
from edge_client.wire.messages import Hello, Traffic


def hello(boot: bytes = b"first...", *, version: int = 0, available: bool = True, sent: int = 0, received: int = 0):
    return Hello(1, boot, bytes(32), version, bytes(32), 5, available, Traffic(sent, received))


def test_who_is_there():
    roster = Roster()
    roster.hello("a", hello())
    roster.hello("b", hello(available=False))
    assert roster.present() == 1
    assert [(c.id, c.available) for c in roster.candidates()] == [("a", True), ("b", False)]
    roster.hello("a", hello(available=False))
    assert roster.present() == 0
    roster.hello("a", hello())
    assert roster.present() == 1
    assert roster.get("c") is None


def test_goodbye_counts_once_and_only_for_the_present_life():
    roster = Roster()
    roster.hello("a", hello())
    roster.hello("a", hello(b"second.."))
    assert not roster.goodbye("a", b"first...")
    assert roster.goodbye("a", b"second..")
    assert not roster.goodbye("a", b"second..")
    assert not roster.goodbye("b", b"first...")
    assert roster.present() == 0
    assert roster.candidates() == []
    roster.hello("a", hello(b"second.."))
    assert roster.present() == 1


def test_the_last_round_survives_a_new_life():
    roster = Roster()
    roster.hello("a", hello()).last_round = 4
    assert roster.hello("a", hello(b"second..")).last_round == 4


def test_the_uplink_is_the_latest():
    roster = Roster()
    roster.hello("a", hello())
    assert roster.hello("a", msgspec.structs.replace(hello(b"second.."), uplink=100.0)).uplink == 100.0
    assert roster.hello("a", hello(b"second..")).uplink == 0.0


def test_versions_held():
    roster = Roster()
    roster.hello("a", hello(version=3))
    roster.hello("b", hello(version=5))
    roster.hello("a", hello(version=4))
    assert roster.versions() == {4, 5}


def test_a_client_that_never_returns_costs_no_version_for_good():
    roster = Roster()
    roster.hello("a", hello(version=3))
    roster.hello("b", hello(version=4))
    roster.goodbye("a", b"first...")
    assert roster.versions(recent=3) == {3, 4}
    assert roster.versions(recent=4) == {4}
    assert roster.versions(recent=9) == {4}
    roster.hello("a", hello(version=3))
    assert roster.versions(recent=9) == {3, 4}


def test_traffic_grows_within_a_life_and_starts_anew_with_the_next():
    roster = Roster()
    roster.hello("a", hello(sent=10, received=100))
    roster.count("a", Traffic(15, 150))
    roster.count("a", Traffic(12, 160))  # overtaken by the one before
    assert (roster.up, roster.down) == (15, 150)
    roster.hello("a", hello(sent=16, received=170))
    assert (roster.up, roster.down) == (16, 170)
    roster.hello("a", hello(b"second..", sent=3, received=4))
    assert (roster.up, roster.down) == (19, 174)
    roster.count("unknown", Traffic(9, 9))
    assert (roster.up, roster.down) == (19, 174)


@pytest.mark.parametrize(("counting", "expected"), [(True, 14), (False, 4)])
def test_after_a_restart_only_what_is_new_counts(counting, expected):
    roster = Roster(counting=counting)
    roster.hello("a", hello(sent=10))
    roster.count("a", Traffic(14, 0))
    assert roster.up == expected


def test_whoever_is_due_is_gone_however_the_sum_is_rounded():
    """A tick that moves nothing is due again at once, and a server would spin."""
    for heard in (124.28571428571429, 125.28571428571429, 1.0):
        roster = Roster(silence=900.0)
        roster.hello("a", hello())
        roster.hear("a", heard)
        assert roster.lapse(roster.wake) == ["a"]
        assert roster.wake is None


def test_who_says_nothing_for_too_long_is_not_there_until_heard_again():
    roster = Roster(silence=100.0)
    assert roster.wake is None
    for client, now in (("a", 0.0), ("b", 50.0)):
        roster.hello(client, hello())
        roster.hear(client, now)
    assert roster.wake == 100.0
    assert roster.lapse(99.0) == []
    assert roster.lapse(100.0) == ["a"]
    assert (roster.present(), [c.id for c in roster.candidates()], roster.wake) == (1, ["b"], 150.0)
    roster.hear("a", 120.0)
    assert roster.present() == 2
    assert roster.lapse(150.0) == ["b"]
    assert roster.lapse(220.0) == ["a"]
    assert (roster.present(), roster.wake) == (0, None)
    roster.hello("a", hello())
    roster.hear("a", 230.0)
    assert (roster.present(), roster.wake) == (1, 330.0)


def test_who_has_said_goodbye_is_not_there_whatever_comes_after():
    roster = Roster(silence=100.0)
    roster.hello("a", hello())
    roster.hear("a", 0.0)
    roster.goodbye("a", b"first...")
    roster.hear("a", 1.0)
    assert roster.present() == 0
    assert roster.lapse(101.0) == []
    roster.hear("a", 102.0)
    assert roster.present() == 0
