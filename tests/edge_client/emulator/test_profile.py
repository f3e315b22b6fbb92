import numpy as np
import pytest

from edge_client.emulator.profile import PhoneProfile, draw_profiles
from edge_client.errors import ConfigError


def test_speeds_are_log_uniform_between_their_bounds():
    speeds = np.array([phone.speed for phone in draw_profiles(4000, speed=(0.25, 4.0), seed=1)])
    assert speeds.min() >= 0.25
    assert speeds.max() <= 4.0
    assert abs((speeds < 1).mean() - 0.5) < 0.03
    assert abs((speeds < 0.5).mean() - 0.25) < 0.03


def test_a_larger_fleet_begins_with_the_smaller_one():
    few, many = (draw_profiles(count, speed=(0.5, 2.0), latency=0.05, seed=9) for count in (5, 50))
    assert few == many[:5]
    assert few != draw_profiles(5, speed=(0.5, 2.0), latency=0.05, seed=10)


def test_what_is_not_drawn_is_shared():
    phone = draw_profiles(3, bandwidth=1e6, latency=0.1, availability=0.5, dropout=0.2)[2]
    assert phone == PhoneProfile(1.0, 1e6, 0.1, 0.5, 0.2)


def test_a_link_and_a_processor_take_their_time():
    phone = PhoneProfile(speed=0.5, bandwidth=1000.0, latency=0.1)
    assert phone.transfer_seconds(2000) == pytest.approx(2.1)
    assert phone.training_seconds(3.0) == 6.0
    assert phone.machine_seconds(phone.training_seconds(3.0)) == 3.0
    assert PhoneProfile(latency=0.2).transfer_seconds(10**9) == 0.2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"speed": (0.0, 1.0)}, "speed"),
        ({"speed": (2.0, 1.0)}, "speed"),
        ({"speed": (1.0, float("inf"))}, "speed"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"latency": -0.1}, "latency"),
        ({"latency": float("nan")}, "latency"),
        ({"availability": 0.0}, "availability"),
        ({"availability": 1.1}, "availability"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_a_value_out_of_range_is_named(settings, name):
    with pytest.raises(ConfigError, match=f"phone {name} is .*; expected"):
        draw_profiles(2, **settings)
