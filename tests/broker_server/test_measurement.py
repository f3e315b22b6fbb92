import numpy as np
import pytest

from broker_server import measurement
from broker_server.measurement import shortfall


@pytest.mark.parametrize(
    ("loss", "output", "target", "mean"),
    [
        ("cross_entropy", [[0.0, 1.0], [2.0, 1.0]], [1, 1], 0.5),
        ("cross_entropy", [[[0.0, 1.0], [2.0, 1.0]]], [[1, 0]], 1.0),
        ("cross_entropy", [[[0.0, 1.0], [2.0, 1.0]]], [[0, -100]], 0.0),
        ("nll", [[-2.0, -0.1], [-0.2, -1.0]], [1, 1], 0.5),
        ("bce_with_logits", [[-1.0], [3.0]], [[0.0], [0.0]], 0.5),
        ("mse", [[1.0], [3.0]], [1.0, 1.0], 2.0),
        ("huber", [[1.0], [3.0]], [1.0, 1.0], 2.0),
        ("l1", [[1.0], [3.0]], [1.0, 1.0], 1.0),
    ],
)
def test_scores(loss, output, target, mean):
    assert measurement._scores(loss, np.float32(output), np.asarray(target)).mean() == mean


@pytest.mark.parametrize(
    ("found", "floats", "worse"),
    [
        ({"accuracy": 0.895, "difference": 0.3}, {"accuracy": 0.9}, ""),
        ({"accuracy": 0.88, "difference": 0.01}, {"accuracy": 0.9}, "accuracy is 0.8800, in floats 0.9000"),
        ({"squared_error": 1.04, "difference": 0.3}, {"squared_error": 1.0}, ""),
        ({"absolute_error": 1.2, "difference": 0.01}, {"absolute_error": 1.0}, "more than 1.05 times as much"),
        ({"difference": 0.02}, {}, ""),
        ({"difference": 0.2}, {}, "outputs are 0.200 of their size away"),
        ({}, {}, ""),
    ],
)
def test_an_8_bit_model_that_is_worse_than_it_should_be_is_marked(found, floats, worse):
    said = shortfall(found, floats)
    assert worse in said
    assert bool(said) == bool(worse)
