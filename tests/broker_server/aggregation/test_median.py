import numpy as np
import pytest
import torch

from broker_server.aggregation.median import median, trimmed_mean
from edge_client.errors import TrainingError
from tests.broker_server.aggregation.stacked import Stacked

ROWS = np.random.default_rng(1803).standard_t(2, (11, 10_000)).astype(np.float32)


def test_the_median_by_hand():
    assert median().finish(Stacked.of([[1, 9], [2, -5], [100, 0]])).tolist() == [2.0, 0.0]
    assert median().finish(Stacked.of([[1], [2], [100], [4]])).tolist() == [3.0]
    assert median().finish(Stacked.of([[7]])).tolist() == [7.0]


def test_the_trimmed_mean_by_hand():
    # floor(0.3 * 4) = 1 is left out at each end.
    assert trimmed_mean(0.3).finish(Stacked.of([[1], [-900], [5], [100]])).tolist() == [3.0]
    assert trimmed_mean(0.0).finish(Stacked.of([[1], [2], [6]])).tolist() == [3.0]
    # A tenth of ten is one, whatever floats make of it; three tenths are three.
    assert trimmed_mean(0.3).finish(Stacked.of([[value] for value in (-9, -8, -7, 1, 2, 3, 6, 70, 80, 90)])).item() == 3


def test_the_median_is_torch_s():
    found = median().finish(Stacked(ROWS, Stacked.of(ROWS).reports, width=6000))
    np.testing.assert_array_equal(found, torch.from_numpy(ROWS).median(dim=0).values.numpy())
    even = torch.from_numpy(ROWS[:10]).double().quantile(0.5, dim=0).float().numpy()
    np.testing.assert_allclose(median().finish(Stacked.of(ROWS[:10])), even, rtol=1e-6)


def test_the_trimmed_mean_is_torch_s():
    middle = torch.from_numpy(ROWS).double().sort(dim=0).values[2:-2].mean(dim=0)
    np.testing.assert_allclose(trimmed_mean(0.2).finish(Stacked.of(ROWS)), middle.float().numpy(), rtol=1e-6)


@pytest.mark.parametrize("rule", [median(), trimmed_mean(0.2)])
def test_the_order_of_updates_changes_no_bit(rule):
    shuffled = ROWS[np.random.default_rng(2).permutation(len(ROWS))]
    assert rule.finish(Stacked.of(ROWS)).tobytes() == rule.finish(Stacked.of(shuffled)).tobytes()


def test_nothing_has_no_median():
    with pytest.raises(TrainingError, match=r"0 updates came; the aggregation needs 1: set round\.minimum"):
        median().finish(Stacked.of(np.zeros((0, 3))))
