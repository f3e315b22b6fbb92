"""Waves: who is asked when, what counts as failed, and what stops it all."""

from dataclasses import dataclass, field, replace

import msgspec
import pytest

from broker_server.inventory import Device, Said
from broker_server.rollout import PRESENT, Rollout, step, wanted, waves
from edge_client.errors import ConfigError
from edge_client.wire import messages as m

PLATFORM = "cp311-aarch64"


@dataclass
class Fleet:
    """Devices, and a rollout that is stepped on."""

    count: int = 20
    failing: float = 0.2
    plan: tuple = ("1", "10%", "100%")
    now: float = 1e9
    seats: dict = field(default_factory=dict)

    def __post_init__(self):
        release = m.Release(b"record", bytes(64))
        self.rollout = Rollout("0.2.0", release, self.plan, self.failing, 1800.0)
        self.devices = {f"d{number:02}": self.device(f"d{number:02}") for number in range(self.count)}

    def device(self, client, software="0.1.0", platform=PLATFORM, progress=None, **more):
        condition = m.Condition(platform=platform, progress=progress)
        return Device(client, self.now, Said(1, 10, True, software, condition), **more)

    def step(self):
        """Go on; who is asked now."""
        self.rollout, changed = step(
            self.rollout, self.seats, self.devices, self.now, lambda platform: platform == PLATFORM
        )
        self.seats |= changed
        return [client for client, seat in changed.items() if seat.state == "asked"]

    def says(self, client, stage, detail=""):
        software = "0.2.0" if stage in ("healthy", "trial") else "0.1.0"
        progress = m.Progress("0.2.0", stage, detail, self.rollout.name)
        self.devices[client] = self.device(client, software, progress=progress)

    def states(self):
        return sorted(seat.state for seat in self.seats.values())


def test_waves_are_numbers_or_shares():
    assert waves("1, 10%,100%") == ("1", "10%", "100%")
    assert [wanted(wave, 25) for wave in ("1", "10%", "100%", "40")] == [1, 3, 25, 25]
    for text in ("", "0", "101%", "ten", "1,,2", "-1", "1.5", "0%"):
        with pytest.raises(ConfigError, match="--waves"):
            waves(text)


def test_each_wave_is_asked_when_all_of_the_one_before_run_it():
    fleet = Fleet()
    asked = [fleet.step()]
    assert len(asked[0]) == 1
    for stage in ("fetching", "staged", "trial"):
        fleet.says(asked[0][0], stage)
        assert fleet.step() == []
    for size in (1, 18):
        for client in asked[-1]:
            fleet.says(client, "healthy")
        asked.append(fleet.step())
        assert len(asked[-1]) == size
    assert fleet.rollout.wave == 2
    for client in asked[-1]:
        fleet.says(client, "healthy")
    assert fleet.step() == []
    assert fleet.rollout.state == "done"
    assert fleet.states() == ["healthy"] * 20


def test_a_first_one_that_fails_stops_it():
    fleet = Fleet()
    (first,) = fleet.step()
    fleet.says(first, "back", "no word from the server")
    assert fleet.step() == []
    assert fleet.rollout.state == "stopped"
    assert fleet.rollout.reason == "1 of 1 in wave 1 failed: no word from the server"
    fleet.now += 1e6
    assert fleet.step() == []


@pytest.mark.parametrize(("failed", "state"), [(2, "done"), (3, "stopped")])
def test_a_share_of_a_wave_may_fail(failed, state):
    fleet = Fleet(count=10, plan=("100%",))
    asked = fleet.step()
    for client in asked[:failed]:
        fleet.says(client, "refused", "no room")
    for client in asked[failed:]:
        fleet.says(client, "healthy")
    fleet.step()
    assert fleet.rollout.state == state


def test_one_that_says_nothing_more_has_failed_and_one_that_never_answered_has_not():
    fleet = Fleet(count=2, plan=("1", "100%"), failing=0.5)
    (first,) = fleet.step()
    fleet.now += 1801
    for client in fleet.devices:
        fleet.devices[client] = fleet.device(client)
    (second,) = fleet.step()  # the first one was not reached: the other one has its place
    assert first != second
    assert fleet.seats[first].state == "missed"
    fleet.says(second, "trial")
    fleet.step()
    fleet.now += 1801
    fleet.step()
    assert fleet.seats[second].state == "failed"
    assert fleet.seats[second].reason == "nothing new for 30 min, it was trial"
    assert fleet.rollout.state == "stopped"


def test_where_none_was_reached_they_are_asked_again_when_they_are_back():
    fleet = Fleet(count=2)
    for _ in range(2):
        (asked,) = fleet.step()
        fleet.now += 1801
        assert fleet.step() == []  # whoever is left has not been heard for half an hour either
        left = next(client for client in fleet.devices if client != asked)
        fleet.devices[left] = fleet.device(left)
    assert fleet.states() == ["missed", "missed"]
    fleet.devices = {asked: fleet.device(asked)}
    assert fleet.step() == [asked]
    fleet.says(asked, "healthy")
    fleet.step()
    assert fleet.rollout.state == "done"


def test_one_that_fetches_over_a_slow_link_is_waited_for_as_long_as_it_says_so():
    fleet = Fleet(count=1)
    (only,) = fleet.step()
    for _ in range(10):
        fleet.says(only, "fetching")
        fleet.step()
        fleet.now += 1000
    assert fleet.seats[only].state == "taken"
    fleet.now += 1000
    fleet.step()
    assert fleet.seats[only].state == "failed"


def test_who_cannot_take_it_or_is_away_or_retired_or_runs_it_is_not_asked():
    fleet = Fleet(count=6, plan=("100%",))
    names = list(fleet.devices)
    fleet.devices[names[0]] = fleet.device(names[0], platform="")
    fleet.devices[names[1]] = fleet.device(names[1], platform="cp313-aarch64")
    fleet.devices[names[2]] = fleet.device(names[2], retired=1.0)
    fleet.devices[names[3]] = fleet.device(names[3], software="0.2.0")
    fleet.devices[names[4]] = fleet.devices[names[4]]._replace(seen=fleet.now - PRESENT - 1)
    fleet.devices["new"] = Device("new", 0.0, None)
    assert fleet.step() == [names[5]]


def test_who_comes_when_all_others_have_it_is_asked_too():
    fleet = Fleet(count=2, plan=("100%",))
    for client in fleet.step():
        fleet.says(client, "healthy")
    fleet.step()
    assert fleet.rollout.state == "done"
    fleet.devices["late"] = fleet.device("late")
    assert fleet.step() == ["late"]
    fleet.says("late", "healthy")
    fleet.step()
    assert fleet.seats["late"].state == "healthy"


def test_what_a_device_says_of_another_release_of_that_version_counts_for_nothing():
    fleet = Fleet(count=1)
    (only,) = fleet.step()
    old = m.Progress("0.2.0", "back", "last week", b"another.")
    fleet.devices[only] = fleet.device(only, progress=old)
    fleet.step()
    assert fleet.seats[only].state == "asked"


def test_the_same_devices_are_chosen_again_for_the_same_release_and_others_for_another():
    def first(record):
        fleet = Fleet(count=100, plan=("10%",))
        fleet.rollout = msgspec.structs.replace(fleet.rollout, release=m.Release(record, bytes(64)))
        return sorted(fleet.step())

    assert first(b"one") == first(b"one") != first(b"two")


def test_a_server_that_starts_anew_goes_on_where_it_was():
    fleet = Fleet(count=4, plan=("1", "100%"))
    (asked,) = fleet.step()
    other = replace(fleet, seats=dict(fleet.seats))
    other.rollout, other.devices = fleet.rollout, dict(fleet.devices)
    assert other.step() == []
    other.says(asked, "healthy")
    assert len(other.step()) == 3
