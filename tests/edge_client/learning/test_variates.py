"""Corrections of gradients by hand, and what a device remembers of them."""

import numpy as np
import pytest

from broker_server.aggregation.local import LocalTraining
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.learning.remembered import pack_vector
from edge_client.learning.variates import distance, feddyn, following, packed, remembered, scaffold

LAYOUT = Layout((TensorSpec("w", (2,)),))
OWN, COMMON = np.array([1.0, -2.0], np.float32), np.array([0.5, 4.0], np.float32)


def test_scaffold_by_hand():
    # Two steps of 0.1 on gradients (3, 5) and (1, 1) from (10, 10): the mean gradient is (2, 3).
    vector = scaffold(OWN, COMMON)
    np.testing.assert_array_equal(vector, [-0.5, 6.0])
    trained = np.array([10, 10]) - 0.1 * ((np.array([3, 5]) + vector) + (np.array([1, 1]) + vector))
    delta = (trained - 10).astype(np.float32)
    np.testing.assert_allclose(following(vector, delta, 1 / distance("sgd", {"lr": 0.1}, 2)), [2, 3], rtol=1e-6)
    np.testing.assert_array_equal(scaffold(None, COMMON), COMMON)
    np.testing.assert_array_equal(scaffold(OWN, None), -OWN)
    assert scaffold(None, None) is None


def test_feddyn_by_hand():
    np.testing.assert_array_equal(feddyn(OWN), [-1.0, 2.0])
    # g - alpha d
    np.testing.assert_allclose(following(feddyn(OWN), np.array([1, 2], np.float32), 0.1), [0.9, -2.2], rtol=1e-6)
    assert feddyn(None) is None
    np.testing.assert_allclose(following(None, np.array([1, 2], np.float32), 0.1), [-0.1, -0.2], rtol=1e-6)


def test_arguments_are_left_alone():
    own, common, delta = OWN.copy(), COMMON.copy(), np.ones(2, np.float32)
    for vector in (scaffold(own, common), scaffold(None, common), scaffold(own, None), feddyn(own)):
        before = vector.copy()
        following(vector, delta, 0.5)[:] = 9
        np.testing.assert_array_equal(vector, before)
        vector[:] = 7
    np.testing.assert_array_equal(own, OWN)
    np.testing.assert_array_equal(common, COMMON)
    np.testing.assert_array_equal(delta, 1)


CASES = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.2, "momentum": 0.5},
    "sgd, pulled": {"lr": 0.1, "mu": 0.5},
    "nesterov, pulled": {"lr": 0.1, "momentum": 0.8, "mu": 1.5},
}


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_gradient_is_told_from_where_steps_led(case, steps):
    """Steps as torch.optim.SGD makes them, on one gradient, whatever pulls and carries on; the server's own formula
    agrees."""
    hypers, name = CASES[case], case.partition(",")[0]
    rate, momentum, pull = (hypers.get(key, 0.0) for key in ("lr", "momentum", "mu"))
    start, gradient = np.array([3.0, -1.0]), np.array([2.0, -0.3])
    weight, velocity = start.copy(), np.zeros(2)
    for _ in range(steps):
        whole = gradient + pull * (weight - start)
        velocity = momentum * velocity + whole
        weight = weight - rate * (whole + momentum * velocity if name == "nesterov" else velocity)
    far = distance(name, hypers, steps)
    np.testing.assert_allclose((start - weight) / far, gradient, rtol=1e-12)
    known = LocalTraining(name, rate, momentum, pull)
    assert rate * known.distance(steps) == pytest.approx(far, rel=1e-12)


def test_a_rule_without_momentum_has_none_whatever_the_plan_says():
    assert distance("sgd", {"lr": 0.5, "momentum": 0.9}, 4) == 2.0


def test_a_rule_that_takes_no_learning_rate_goes_no_known_way():
    assert distance("momentum", {"momentum": 0.9}, 4) == 0.0


def test_a_memory_comes_back_and_what_cannot_be_used_counts_as_none():
    data = packed(OWN, LAYOUT, 7)
    assert data is not None
    np.testing.assert_array_equal(remembered(data, LAYOUT, 7), OWN)
    assert remembered(None, LAYOUT, 7) is None
    assert remembered(data, LAYOUT, 8) is None, "another run's"
    assert remembered(data, Layout((TensorSpec("v", (2,)),)), 7) is None, "another layout's"
    assert remembered(pack_vector(OWN, LAYOUT), LAYOUT, 7) is None
    for end in range(len(data)):
        assert remembered(data[:end], LAYOUT, 7) is None
    assert remembered(data + b"\0", LAYOUT, 7) is None
    assert remembered(data[:-4] + np.array([np.nan], "<f4").tobytes(), LAYOUT, 7) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_remembered(bad):
    delta = np.array([bad, 1], np.float32)
    assert packed(following(OWN, delta, 0.5), LAYOUT, 0) is None
    assert packed(following(OWN, np.full(2, 3e38, np.float32), 100.0), LAYOUT, 0) is None
