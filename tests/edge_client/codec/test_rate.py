import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.codec.rate import TOLERANCE, solve


class Measured:
    """A function, and what was asked of it."""

    def __init__(self, function):
        self.function = function
        self.steps = []

    def __call__(self, step):
        self.steps.append(step)
        return self.function(step)

    def miss(self, step, goal):
        return abs(math.log(self.function(step) / goal))


def solved(function, goal, start=1.0, slope=-1.5, bounds=(1e-12, 1e12)):
    measured = Measured(function)
    solve(measured, goal, start, slope, bounds)
    assert len(measured.steps) <= 10
    assert all(bounds[0] <= step <= bounds[1] for step in measured.steps)
    assert measured.miss(measured.steps[-1], goal) == min(measured.miss(step, goal) for step in measured.steps)
    return measured


@given(st.floats(-3, -0.5), st.floats(-8, 8), st.floats(-5, 5))
def test_powers_are_met(power, goal, start):
    measured = solved(lambda step: step**power, math.exp(goal), math.exp(start))
    assert measured.miss(measured.steps[-1], math.exp(goal)) <= TOLERANCE


@given(st.floats(0.5, 2.5), st.floats(-8, -0.1))
def test_rising_functions_are_met(power, goal):
    measured = solved(lambda step: step**power, math.exp(goal), slope=1.5)
    assert measured.miss(measured.steps[-1], math.exp(goal)) <= TOLERANCE


@pytest.mark.parametrize("goal", [0.02, 0.1, 0.5, 1.0, 4.0, 8.0])
def test_the_rate_of_a_laplace_source_is_met(goal):
    """Bits of an entropy coder: a power at neither end."""

    def bits(step):
        zero = 1 - math.exp(-0.7 * step)
        ratio = math.exp(-step)
        rest = 1 - zero
        geometric = 1 + (-math.log2(1 - ratio) - ratio / (1 - ratio) * math.log2(ratio)) if ratio > 0 else 1.0
        return -sum(p * math.log2(p) for p in (zero, rest) if p > 0) + rest * geometric

    measured = solved(bits, goal, 0.6 * goal ** (-1 / 1.5))
    assert measured.miss(measured.steps[-1], goal) <= TOLERANCE


def test_what_is_near_enough_at_once_is_measured_once():
    assert solved(lambda step: step**-1.5, 1.01).steps == [1.0]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.2))
def test_noise_does_not_lead_astray(seed, noise):
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, 6, 8)

    def rough(step):
        waves = sum(math.sin(2**i * math.log(step) + phase) for i, phase in enumerate(phases))
        return step**-1.2 * math.exp(noise * waves / 8)

    measured = solved(rough, 0.03, 5.0)
    assert measured.miss(measured.steps[-1], 0.03) <= max(TOLERANCE, 2 * noise)


@given(st.floats(0.5, 60))
def test_steps_end_on_the_nearest_that_was_seen(goal):
    measured = solved(lambda step: max(1.0, math.floor(20 / step)), goal)
    assert measured.miss(measured.steps[-1], goal) <= measured.miss(1.0, goal)


@pytest.mark.parametrize(("goal", "end"), [(1e30, 1e-3), (1e-30, 1e3)])
def test_goals_out_of_reach_end_at_the_bound(goal, end):
    assert solved(lambda step: step**-1.5, goal, bounds=(1e-3, 1e3)).steps[-1] == pytest.approx(end)


def test_a_constant_function_ends():
    solved(lambda step: 7.0, 1.0)
    solved(lambda step: 7.0, 1.0, bounds=(1.0, 1.0))


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=40))
def test_any_function_ends_with_the_best_that_was_measured(values):
    solved(lambda step: values[hash(round(step, 9)) % len(values)], 1.0, bounds=(0.01, 100))
