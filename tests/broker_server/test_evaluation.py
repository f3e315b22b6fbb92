import math

import numpy as np
import pytest

from broker_server.evaluation import HeldOut, combine
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.errors import DataError
from tests.toy import toy_bundle, toy_data


@pytest.fixture(scope="module")
def bundle():
    return Bundle.from_bytes(toy_bundle())


def by_hand(bundle: Bundle, data: dict[str, np.ndarray]) -> dict[str, float]:
    weight, bias = bundle.weights["weight"], bundle.weights["bias"]
    logits = data["x"].astype(np.float64) @ weight.T + bias
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = chances[np.arange(len(logits)), data["y"]]
    return {"accuracy": float((logits.argmax(1) == data["y"]).mean()), "loss": float(-np.log(right).mean())}


def test_metrics_by_hand(bundle):
    data = toy_data(100, seed=3)
    found = HeldOut(bundle, ArraySource(data), batch_size=32).evaluate(bundle.initial())
    assert found == pytest.approx(by_hand(bundle, data), rel=1e-5)


def test_clients_together_are_one_data_set(bundle):
    data, vector = toy_data(100, seed=3), bundle.initial()
    trainer = HeldOut(bundle, ArraySource(data))._trainer
    parts = [
        trainer.evaluate(vector, ArraySource({name: array[start:stop] for name, array in data.items()}))
        for start, stop in ((0, 7), (7, 60), (60, 100))
    ]
    assert combine(parts) == pytest.approx(by_hand(bundle, data), rel=1e-5)
    assert combine(parts) == combine(parts[::-1]), "to the last bit"


def test_data_from_a_file_and_data_that_does_not_fit(bundle, tmp_path):
    np.savez(tmp_path / "good.npz", **toy_data(50, seed=1))
    np.savez(tmp_path / "wide.npz", **toy_data(50, seed=1, features=5))
    assert HeldOut.open(bundle, str(tmp_path / "good.npz")).evaluate(bundle.initial()).keys() == {"accuracy", "loss"}
    with pytest.raises(DataError, match=r"\[50, 5\].*\[n, 4\]"):
        HeldOut.open(bundle, str(tmp_path / "wide.npz"))


@pytest.mark.parametrize(
    ("sums", "metrics"),
    [
        ([], {}),
        ([{"count": 0.0, "loss": 0.0}], {}),
        ([{"count": 4.0, "loss": 2.0, "correct": 3.0}], {"loss": 0.5, "accuracy": 0.75}),
        ([{"count": 1.0, "loss": 2.0, "odd": 1.0}, {"count": 3.0, "loss": 4.0}], {"loss": 1.5}),
        ([{"loss": 2.0}], {}),
    ],
)
def test_combining(sums, metrics):
    assert combine(sums) == metrics


def test_a_diverged_model_shows():
    assert math.isnan(combine([{"count": 1.0, "loss": math.inf}, {"count": 1.0, "loss": -math.inf}])["loss"])
    assert combine([{"count": 1.0, "loss": math.inf}, {"count": 1.0, "loss": 1.0}])["loss"] == math.inf
