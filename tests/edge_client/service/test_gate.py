"""When a device may train: every reason, with hysteresis, from readings alone."""

import dataclasses

import pytest

from edge_client.errors import ConfigError
from edge_client.service.board import Readings
from edge_client.service.gate import ALWAYS, Gate, Rules

FINE = Readings(degrees=50.0, others=0.1, free=500 << 20, minute=12 * 60, interface="eth0", on_battery=False)
RULES = Rules(settle=60.0)

AGAINST = {
    "hot": ({"degrees": 75.0}, RULES, "75 degrees (at most 75)"),
    "busy": ({"others": 0.8}, RULES, "other programs use 80% of the processors (at most 50%)"),
    "memory": ({"free": 40 << 20}, RULES, "40 MiB of memory free (at least 48)"),
    "supply": ({"undervoltage": True}, RULES, "the power supply is too weak"),
    "clock": ({"minute": None}, Rules(hours=("22:00-06:00",)), "the clock cannot be right"),
    "hours": ({}, Rules(hours=("22:00-06:00", "10:00-11:00")), "not within 22:00-06:00 or 10:00-11:00"),
    "metered": ({"interface": "wwan0"}, RULES, "the network is metered (wwan0)"),
    "battery": ({"on_battery": True, "battery": 100.0}, RULES, "on battery, at 100 %"),
    "low battery": ({"on_battery": True, "battery": 79.0}, Rules(battery=80.0), "on battery, at 79 %"),
}


@pytest.mark.parametrize("name", AGAINST)
def test_each_reason_forbids_and_says_so(name):
    change, rules, expected = AGAINST[name]
    gate = Gate(rules)
    worse = dataclasses.replace(FINE, **change)
    verdict = gate.decide(worse, 0.0)
    assert not verdict.allowed
    (reason,) = verdict.reasons
    assert expected in reason
    assert str(verdict) == f"does not train: {reason}"
    assert Gate(ALWAYS).decide(worse, 0.0).allowed


def test_a_device_that_starts_trains_at_once():
    verdict = Gate(RULES).decide(FINE, 0.0)
    assert verdict.allowed
    assert str(verdict) == "may train"


def test_what_a_board_does_not_tell_forbids_nothing():
    assert Gate(RULES).decide(Readings(), 0.0).allowed


def test_it_goes_on_when_all_has_been_well_for_a_while():
    gate = Gate(RULES)
    assert not gate.decide(dataclasses.replace(FINE, undervoltage=True), 0.0).allowed
    waiting = gate.decide(FINE, 10.0)
    assert not waiting.allowed
    assert str(waiting) == "does not train: waits for things to settle"
    assert not gate.decide(FINE, 69.0).allowed
    assert not gate.decide(dataclasses.replace(FINE, undervoltage=True), 69.5).allowed
    assert not gate.decide(FINE, 70.0).allowed
    assert not gate.decide(FINE, 129.0).allowed
    assert gate.decide(FINE, 130.0).allowed


SWINGS = {
    "degrees": [(74, True), (75, False), (74, False), (66, False), (65, True), (74, True), (80, False)],
    "others": [(0.5, True), (0.51, False), (0.3, False), (0.25, True), (0.45, True)],
    "free": [(48 << 20, False), (55 << 20, False), (60 << 20, True), (49 << 20, True)],
}


@pytest.mark.parametrize("name", SWINGS)
def test_between_two_limits_it_stays_as_it_is(name):
    swings = SWINGS[name]
    gate = Gate(Rules(settle=0.0))
    for value, allowed in swings:
        assert gate.decide(dataclasses.replace(FINE, **{name: value}), 0.0).allowed is allowed, value


def test_a_battery_is_charged_some_more_before_training_goes_on():
    gate = Gate(Rules(battery=60.0, settle=0.0))
    for charge, on_battery, allowed in [(61, True, True), (59, True, False), (62, True, False), (65, True, True)]:
        readings = dataclasses.replace(FINE, on_battery=on_battery, battery=charge)
        assert gate.decide(readings, 0.0).allowed is allowed, charge
    assert gate.decide(dataclasses.replace(FINE, on_battery=False, battery=1.0), 0.0).allowed


@pytest.mark.parametrize(
    ("hours", "minutes"),
    [
        ("22:00-06:00", {1319: False, 1320: True, 0: True, 359: True, 360: False}),
        ("10:00-11:30", {599: False, 600: True, 689: True, 690: False}),
        ("00:00-24:00", {0: True, 1439: True}),
    ],
)
def test_hours_go_over_midnight(hours, minutes):
    for minute, allowed in minutes.items():
        gate = Gate(Rules(hours=(hours,)))
        assert gate.decide(dataclasses.replace(FINE, minute=minute), 0.0).allowed is allowed, minute


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"hours": ("6-7",)}, "hours '6-7': expected a window such as 22:00-06:00"),
        ({"hours": ("10:00-24:30",)}, "a day ends at 24:00"),
        ({"hottest": -1.0}, "hottest = -1.0: expected 0 to 150"),
        ({"others": 1.5}, "others = 1.5"),
        ({"battery": float("nan")}, "battery = nan"),
    ],
)
def test_rules_out_of_range_are_refused(rules, expected):
    with pytest.raises(ConfigError, match="training") as caught:
        Gate(Rules(**rules))
    assert expected in str(caught.value)
