import numpy as np
import torch

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.weighting import Report
from tests.broker_server.aggregation.sums import total, updates


def test_by_hand():
    rule = fedavg()
    state = total(rule, [(np.float32([1, 2]), Report(samples=1)), (np.float32([5, -2]), Report(samples=3, weight=3.0))])
    assert (state.sums, state.updates, state.samples) == ((4.0,), 2, 4)
    mean = rule.finish(state)
    assert mean.dtype == np.float32
    assert mean.tolist() == [4.0, -1.0]


def test_a_shortened_update_weighs_as_much():
    rule = fedavg()
    entries = [(np.float32([8]), Report(scale=0.25)), (np.float32([4]), Report())]
    assert rule.finish(total(rule, entries)).tolist() == [3.0]


def test_equals_the_weighted_mean_of_torch():
    entries = updates()
    weights = torch.tensor([report.weight for _, report in entries], dtype=torch.float64)
    stacked = torch.from_numpy(np.stack([update for update, _ in entries])).double()
    expected = (weights @ stacked / weights.sum()).float().numpy()
    np.testing.assert_allclose(fedavg().finish(total(fedavg(), entries)), expected, rtol=1e-6, atol=1e-8)
