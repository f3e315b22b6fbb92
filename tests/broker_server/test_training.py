"""What clients are told to do: the bounds of a task, and a learning rate that falls over the rounds."""

import msgspec
import pytest

from broker_server.config import Federation
from broker_server.training import check_hypers, train_plan
from edge_client.bundle import Bundle
from edge_client.errors import ConfigError
from edge_client.wire.messages import TrainPlan
from tests.toy import toy_bundle


def settings(train, **sections):
    base = {"federation": {"name": "toys", "bundle": "b"}, "train": train}
    return msgspec.convert(base | sections, Federation)


@pytest.mark.parametrize(
    ("train", "plan"),
    [
        ({}, TrainPlan(epochs=1)),
        ({"epochs": 3, "seconds": 5}, TrainPlan(epochs=3, seconds=5.0)),
        ({"seconds": 5}, TrainPlan(epochs=10_000, seconds=5.0)),
        ({"steps": 7, "seconds": 5}, TrainPlan(epochs=10_000, steps=7, seconds=5.0)),
        ({"schedule": "cosine"}, TrainPlan(schedule="cosine")),
        ({"validation": 0.2, "patience": 3}, TrainPlan(validation=0.2, patience=3)),
    ],
)
def test_what_bounds_a_task_and_how_its_rate_falls_travel_with_it(train, plan):
    assert train_plan(settings(train), 4) == plan


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ({}, [0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"kind": "step", "every": 2, "factor": 0.1}, [0.5, 0.5, 0.05, 0.05, 0.005]),
        ({"kind": "exponential", "every": 1, "factor": 0.99}, [0.5 * 0.99**passed for passed in range(5)]),
        ({"kind": "linear"}, [0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"kind": "linear", "rounds": 2, "least": 0.2}, [0.5, 0.3, 0.1, 0.1, 0.1]),
        ({"warmup": 1}, [0.25, 0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_the_rate_that_tasks_start_with_falls_over_the_rounds(decay, rates):
    found = settings({"hypers": {"lr": 0.5, "weight_decay": 0.1}, "decay": decay}, stop={"rounds": 5})
    plans = [train_plan(found, round_) for round_ in range(1, 6)]
    assert [plan.hypers["lr"] for plan in plans] == pytest.approx(rates)
    assert {plan.hypers["weight_decay"] for plan in plans} == {0.1}
    assert found.train.hypers["lr"] == 0.5


@pytest.mark.parametrize(
    ("hypers", "says"),
    [
        ({"rate": 1.0}, r"train\.hypers\.rate is not .* of bundle 'toy'; known there: lr, weight_decay$"),
        ({"max_norm": 1.0}, r"known there: lr, weight_decay, or export it with --clip$"),
        ({"mu": 1.0}, "or export it with --proximal$"),
    ],
)
def test_hyperparameters_that_the_bundle_has_not_got(hypers, says):
    with pytest.raises(ConfigError, match=says):
        check_hypers(settings({"hypers": hypers}), Bundle.from_bytes(toy_bundle()).manifest)


def test_a_schedule_needs_a_learning_rate():
    manifest = msgspec.structs.replace(Bundle.from_bytes(toy_bundle()).manifest, hypers=())
    check_hypers(settings({}), manifest)
    with pytest.raises(ConfigError, match=r'train\.schedule is "linear" and bundle \'toy\' has no lr'):
        check_hypers(settings({"schedule": "linear"}), manifest)
