"""What sets one emulated phone apart from another: its processor, its link, and how often it is there."""

import math
from dataclasses import dataclass

import numpy as np

from edge_client.errors import ConfigError


@dataclass(frozen=True)
class PhoneProfile:
    """The hardware and habits of one phone.

    Raises:
        ConfigError: a value is out of its range.
    """

    speed: float = 1.0
    """Training speed as a factor of the emulating machine's: 0.25 takes four times as long. Above 0."""
    bandwidth: float = 0.0
    """Bytes a second in each direction; 0 is unlimited."""
    latency: float = 0.0
    """Seconds that one message takes on top of its bytes."""
    availability: float = 1.0
    """Fraction of the time at which the phone may train, in (0, 1]."""
    dropout: float = 0.0
    """Probability that the phone vanishes during a task, in [0, 1]."""

    def __post_init__(self) -> None:
        _require("speed", self.speed, self.speed > 0, "a factor above 0")
        _require("bandwidth", self.bandwidth, self.bandwidth >= 0, "bytes a second, 0 for unlimited")
        _require("latency", self.latency, self.latency >= 0, "seconds, at least 0")
        _require("availability", self.availability, 0 < self.availability <= 1, "a fraction above 0, at most 1")
        _require("dropout", self.dropout, 0 <= self.dropout <= 1, "a probability from 0 to 1")

    def transfer_seconds(self, size: int) -> float:
        """Seconds that ``size`` bytes take over the phone's link."""
        return self.latency + (size / self.bandwidth if self.bandwidth else 0.0)

    def training_seconds(self, seconds: float) -> float:
        """Seconds that the phone takes for what the emulating machine did in ``seconds``."""
        return seconds / self.speed

    def machine_seconds(self, seconds: float) -> float:
        """Seconds in which the emulating machine does what the phone does in ``seconds``."""
        return seconds * self.speed


def draw_profiles(
    count: int,
    *,
    speed: tuple[float, float] = (1.0, 1.0),
    bandwidth: float = 0.0,
    latency: float = 0.0,
    availability: float = 1.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> list[PhoneProfile]:
    """``count`` phones whose speeds are log-uniform over ``speed`` (low, high); all else they share.

    Log-uniform, because phones differ by factors: as many are twice as slow as the middle as are twice as fast. A
    phone's draw depends on the seed and its number only, so a larger fleet begins with the smaller one's phones.

    Raises:
        ConfigError: a value is out of its range.
    """
    low, high = speed
    _require("speed", speed, 0 < low <= high < math.inf, "[low, high] factors with 0 < low <= high")
    factors = np.exp(np.random.default_rng(seed).uniform(math.log(low), math.log(high), count))
    return [PhoneProfile(float(factor), bandwidth, latency, availability, dropout) for factor in factors]


def _require(name: str, found: object, fits: bool, expected: str) -> None:
    if not fits:
        raise ConfigError(f"phone {name} is {found}; expected {expected}")
