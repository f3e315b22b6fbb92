"""What a device tells of its data: counts by hand, exact and in any order, and nothing that its owner keeps."""

import dataclasses

import msgspec
import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.codec.model import untrained
from edge_client.data import ArraySource
from edge_client.errors import ConfigError, TrainingError
from edge_client.learning.assessment import assess
from edge_client.learning.assignment import Assignment
from edge_client.manifest import Feature
from edge_client.reporting import LIMB, UNIT, USUAL, classes, report_layouts, sharing
from edge_client.trainer import Trainer
from edge_client.wire.messages import ReportPlan, TrainPlan
from tests.toy import toy_bundle, toy_data

BUNDLE = Bundle.from_bytes(toy_bundle())
ALL = frozenset({"confusion", "labels", "features"})
EVERYTHING = ReportPlan(confusion=True, labels=True, bins=4, low=-2.0, high=2.0)


def task(train, test, report=EVERYTHING, shares=ALL, trainer=None, stop=lambda: False):
    received = untrained(BUNDLE.layout, BUNDLE.initial_buffers())
    return Assignment(
        TrainPlan(report=report),
        0,
        received,
        trainer or Trainer(BUNDLE),
        ArraySource(train),
        ArraySource(test),
        lambda name: None,
        stop,
        shares=shares,
    )


def logits(data):
    return data["x"] @ BUNDLE.weights["weight"].T + BUNDLE.weights["bias"]


def test_confusion_is_counted_by_class_and_choice_over_all_batches():
    data = toy_data(700, seed=5)
    learned = assess(task(toy_data(3), data))
    counts = learned.vectors["confusion"].reshape(3, 3)
    chosen = logits(data).argmax(1)
    for true in range(3):
        for said in range(3):
            assert counts[true, said] == ((data["y"] == true) & (chosen == said)).sum()
    assert counts.trace() == learned.scalars["sum.correct"]
    assert counts.sum() == learned.scalars["sum.count"] == learned.scalars["samples"]


def test_labels_and_features_are_of_what_is_trained_on():
    x = np.array([[-2.0, -1.0, 0.0, 2.0], [-2.5, -0.5, 1.0, 1.999], [np.inf, 5.0, 0.5, -1.5]], np.float32)
    learned = assess(task({"x": x, "y": np.array([2, 2, 0])}, toy_data(4)))
    assert learned.vectors["labels"].tolist() == [1, 0, 2]
    found = learned.vectors["features"].reshape(4, 10)
    # Below, four bins of [-2, 2], above.
    assert found[:, :6].tolist() == [
        [1, 1, 0, 0, 0, 0],  # infinity is not counted
        [0, 0, 2, 0, 0, 1],
        [0, 0, 0, 2, 1, 0],
        [0, 1, 0, 0, 2, 0],
    ]
    first, second = found[:, 6] * LIMB + found[:, 7], found[:, 8] * LIMB + found[:, 9]
    assert first.tolist() == [
        0,
        (0.25 + 0.375) * UNIT,
        (0.5 + 0.75 + 0.625) * UNIT,
        pytest.approx(2.12475 * UNIT, abs=1),
    ]
    assert second[1] == round((0.25**2 + 0.375**2) * UNIT)


def test_large_sums_are_told_in_two_parts_without_a_rounding():
    many = 2000
    data = {"x": np.full((many, 4), 1.5, np.float32), "y": np.zeros(many, np.int64)}
    found = assess(task(data, toy_data(4))).vectors["features"].reshape(4, 10)
    whole = found[0, 6:].astype(np.float64)
    assert whole[0] * LIMB + whole[1] == many * 0.875 * UNIT > LIMB
    assert whole[2] * LIMB + whole[3] == many * 0.875**2 * UNIT


@pytest.mark.parametrize(
    ("shares", "told"),
    [("", {"confusion"}), ("labels", {"confusion", "labels"}), ("labels, features", ALL), ("nothing", set())],
)
def test_nothing_is_told_that_the_owner_keeps(shares, told):
    learned = assess(task(toy_data(5), toy_data(5), shares=sharing(shares)))
    assert learned.vectors.keys() == told
    plain = {"samples", "sum.count", "sum.correct", "sum.loss"}
    assert learned.scalars.keys() == (plain | {"samples.held"} if "labels" in told else plain)


def test_nothing_is_told_that_is_not_asked_for():
    assert assess(task(toy_data(5), toy_data(5), report=ReportPlan())).vectors == {}


def test_what_can_be_shared_is_said():
    for text in ("label", "labels,nothing"):
        with pytest.raises(ConfigError, match=r"share is .*; expected labels, features, both with a comma, or nothing"):
            sharing(text)
    assert sharing("") == USUAL


def with_shapes(target, output, dtype="int64", metrics=("correct",)):
    return msgspec.structs.replace(
        BUNDLE.manifest,
        targets=(Feature("y", target, dtype, labels=("sit", "run")),),
        outputs=(Feature("scores", output, "float32"),),
        metrics=metrics,
    )


def test_the_classes_of_sequences_come_last_or_first():
    found = [classes(with_shapes((5,), shape)) for shape in ((5, 3), (3, 5))]
    assert [(one.count, one.axis) for one in found] == [(3, -1), (3, 1)]
    assert found[0].names == ("sit", "run", "2")
    for odd in (
        with_shapes((), (3,), "float32"),
        with_shapes((5,), (5,)),
        with_shapes((), (3,), metrics=()),
        msgspec.structs.replace(BUNDLE.manifest, outputs=()),
    ):
        assert classes(odd) is None
        assert report_layouts(odd, EVERYTHING).keys() == {"features"}
    assert report_layouts(with_shapes((), (1001,)), EVERYTHING).keys() == {"features"}


@pytest.mark.parametrize("axis", [-1, 1])
def test_each_place_of_a_sequence_counts_and_padding_does_not(axis):
    wanted = np.array([[0, 1, -100, 2], [2, 2, 1, 7]])
    chosen = np.array([[0, 2, 1, 2], [2, 0, 1, 1]])
    scores = np.eye(3, dtype=np.float32)[chosen]
    manifest = with_shapes((4,), (4, 3) if axis == -1 else (3, 4))

    class Scores:
        bundle = dataclasses.replace(BUNDLE, manifest=manifest)

        def evaluate(self, *_, **__):
            return {}

        def predict(self, *_, **__):
            yield {"y": wanted}, [scores if axis == -1 else scores.transpose(0, 2, 1)]

    learned = assess(task({"y": wanted}, {"y": wanted}, ReportPlan(confusion=True, labels=True), trainer=Scores()))
    assert learned.vectors["confusion"].reshape(3, 3).tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 2]]
    assert learned.vectors["labels"].tolist() == [1, 2, 3]


def test_an_input_of_many_values_has_one_histogram():
    shape = {
        "x": Feature("x", (5, 13), "float32"),
        "z": Feature("z", (8, 8), "float32"),
        "n": Feature("n", (), "int64"),
    }
    manifest = msgspec.structs.replace(BUNDLE.manifest, inputs=tuple(shape.values()))
    layout = report_layouts(manifest, ReportPlan(bins=10))["features"]
    assert [(tensor.name, tensor.shape) for tensor in layout.tensors] == [("x", (1, 16)), ("z", (64, 16))]


def test_a_task_that_is_stopped_ends():
    with pytest.raises(TrainingError, match="stopped"):
        assess(task(toy_data(5), toy_data(5), stop=lambda: True))


def test_counts_add_up_to_those_of_all_data_at_once():
    whole = toy_data(90, seed=7)
    parts = [{name: array[start::3] for name, array in whole.items()} for start in range(3)]
    told = [assess(task(part, part)).vectors for part in parts]
    at_once = assess(task(whole, whole)).vectors
    for name in ("confusion", "labels"):
        np.testing.assert_array_equal(sum(one[name] for one in told), at_once[name])
    counts = sum(one["features"].reshape(4, 10) for one in told)
    np.testing.assert_array_equal(counts[:, :6], at_once["features"].reshape(4, 10)[:, :6])


class Recording:
    """A source that each pass finds with another number of samples."""

    def __init__(self, counts):
        self.samples, self.left = counts[0], iter(counts)

    def batches(self, size, *, seed):
        self.samples = next(self.left)
        return ArraySource(toy_data(self.samples)).batches(size, seed=seed)


@pytest.mark.parametrize("counts", [[5, 9], [9, 5]], ids=["comes", "goes"])
def test_a_device_claims_no_less_than_it_counts_while_its_samples_come_and_go(counts):
    both = task(toy_data(9), toy_data(9))
    asked = dataclasses.replace(both, train=Recording(counts), test=Recording(counts))
    learned = assess(asked)
    assert learned.scalars["samples"] >= learned.vectors["confusion"].sum() == counts[1]
    assert learned.scalars["samples.held"] >= learned.vectors["labels"].sum() == counts[0]
    assert learned.scalars["samples.held"] >= learned.vectors["features"].reshape(4, 10)[:, :6].sum(1).max()
