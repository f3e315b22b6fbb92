import math

import numpy as np
import pytest
import torch

from broker_server.aggregation.geometric_median import Weiszfeld, geometric_median
from tests.broker_server.aggregation.stacked import Stacked

RULE = geometric_median(Weiszfeld())
EXACT = geometric_median(Weiszfeld(tolerance=1e-14, iterations=5000))


def test_by_hand():
    # The Fermat point of an isosceles triangle with sides below 120 degrees sees all corners at 120 degrees.
    rows = [[-1, 0], [1, 0], [0, 3]]
    np.testing.assert_allclose(EXACT.finish(Stacked.of(rows)), [0, 1 / math.sqrt(3)], atol=1e-4)
    # On a line it is the median.
    np.testing.assert_allclose(EXACT.finish(Stacked.of([[0], [1], [1000]])), [1], atol=1e-3)


def test_weights_count():
    np.testing.assert_allclose(EXACT.finish(Stacked.of([[0], [1], [1000]], [1.0, 1.0, 3.0])), [1000], rtol=1e-5)


def test_one_step_is_the_paper_s():
    rows = np.float32([[0, 0], [4, 0], [0, 12]])
    weights = np.array([1.0, 2.0, 1.0])
    mean = weights @ rows / 4
    inverse = weights / np.linalg.norm(rows - mean, axis=1)
    once = geometric_median(Weiszfeld(iterations=1)).finish(Stacked.of(rows, weights.tolist()))
    np.testing.assert_allclose(once, inverse @ rows / inverse.sum(), rtol=1e-6)


def test_it_is_where_torch_finds_the_least_weighted_distance():
    rng = np.random.default_rng(1912)
    rows, weights = rng.normal(2, 1, (9, 50)).astype(np.float32), rng.uniform(1, 5, 9)
    point = torch.from_numpy(rows.mean(axis=0)).double().requires_grad_(True)
    optimizer = torch.optim.LBFGS([point], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def distance():
        optimizer.zero_grad()
        total = (torch.from_numpy(weights) * (torch.from_numpy(rows).double() - point).norm(dim=1)).sum()
        total.backward()
        return total

    optimizer.step(distance)
    found = EXACT.finish(Stacked.of(rows, weights.tolist()))
    np.testing.assert_allclose(found, point.detach().numpy(), atol=1e-4)


def test_equal_updates_are_their_own_median():
    row = np.random.default_rng(3).normal(size=40).astype(np.float32)
    np.testing.assert_allclose(RULE.finish(Stacked.of([row] * 5)), row, rtol=1e-6)
    assert not RULE.finish(Stacked.of(np.zeros((3, 4)))).any()


@pytest.mark.parametrize("far", [1e3, 1e6])
def test_what_lies_far_out_moves_it_no_more_than_what_lies_near(far):
    rows = np.random.default_rng(4).normal(0, 1, (10, 30)).astype(np.float32)
    moved = []
    for distance in (100.0, far):
        pulled = rows.copy()
        pulled[:2] = distance
        moved.append(RULE.finish(Stacked.of(pulled)))
    np.testing.assert_allclose(moved[0], moved[1], atol=0.02)
