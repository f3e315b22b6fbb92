"""Early stopping by hand: which model is the best, when training ends, and what of it is sent."""

import math

import numpy as np
import pytest

from edge_client.data import ArraySource
from edge_client.errors import DataError
from edge_client.learning.validation import EarlyStop, kept_aside
from edge_client.trainer import Epoch, TrainResult

NAN = math.nan


def stopped(losses, patience):
    """What comes of epochs with these losses, the first of which is the received model's; epoch e's weights are e."""
    left = iter(losses)
    model, buffers = np.zeros(2, np.float32), np.zeros(1, np.float32)
    early = EarlyStop(lambda model, buffers: next(left), patience, model, buffers)
    for epoch in range(1, len(losses)):
        model[:] = epoch
        if early(Epoch(model, np.float32([10 * epoch]), 5 * epoch, 0.5 * epoch)):
            break
    result = TrainResult(model, buffers, 20, 5 * epoch, 0.5 * epoch, epoch, 1.0, 0.3, {"loss": 6.0}, True)
    return early, early.settle(result), epoch


@pytest.mark.parametrize(
    ("losses", "patience", "epochs", "best"),
    [
        ([3, 2, 1], 1, 2, 2),
        ([3, 2, 4, 1], 1, 2, 1),
        ([3, 2, 4, 1], 2, 3, 3),
        ([3, 2, 2.5, 2.2, 1], 2, 3, 1),
        ([3, 2, 2, 2], 2, 3, 1),
        ([1, 2, 3, 0], 2, 2, 0),
        ([3, 2, NAN, NAN, 1], 2, 3, 1),
        ([NAN, 5, 6], 3, 2, 1),
        ([NAN, NAN, 6], 3, 2, 2),
        ([NAN, NAN, NAN], 2, 2, 0),
        ([3, math.inf, 2], 2, 2, 2),
    ],
)
def test_training_ends_after_so_many_epochs_without_a_better_loss_and_the_best_model_counts(
    losses, patience, epochs, best
):
    early, result, found = stopped(losses, patience)
    assert found == epochs
    np.testing.assert_array_equal(result.local, [best, best])
    np.testing.assert_array_equal(result.buffers, [10 * best])
    assert (result.steps, result.distance) == (5 * best, 0.5 * best)
    np.testing.assert_equal([early.before, early.least], [losses[0], losses[best]])
    assert (result.epochs, result.samples, result.loss) == (epochs, 20, 0.3)


def test_the_best_model_is_written_into_the_memory_that_was_trained():
    _, result, _ = stopped([3, 2, 4], 1)
    assert result.local.base is None
    assert result.local.flags.writeable


class Own:
    """A source of the user's."""

    samples = 10

    def batches(self, size, *, seed):
        return iter(())


def test_a_source_of_one_s_own_that_cannot_be_split_is_told_what_is_missing():
    with pytest.raises(DataError, match=r"a data source of type Own keeps nothing aside, .* apart\(share\)"):
        kept_aside(Own(), 0.2)


def test_one_that_can_be_split_is():
    source = ArraySource({"y": np.arange(10)})
    left, aside = kept_aside(source, 0.2)
    assert (left.samples, aside.samples) == (8, 2)
