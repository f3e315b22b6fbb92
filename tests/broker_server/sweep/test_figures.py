"""What runs came to, in figures."""

import math

import pytest

from broker_server.config import Stop
from broker_server.sweep.figures import figures, rows, summary, swept
from broker_server.sweep.runs import Run, plan
from tests.broker_server.sweep.files import federation, result

LEARNED = result(
    ({"accuracy": 0.4, "train_loss": 3.0}, 10, 20, 1.0),
    ({"accuracy": 0.7, "train_loss": 2.0}, 11, 21, 2.0),
    ({"accuracy": 0.6, "loss": 0.5, "train_loss": 1.0}, 12, 22, 3.0),
    ({"train_loss": 0.5}, 13, 23, 4.0),
)


def test_figures_of_a_run():
    assert figures(LEARNED, Stop(target=0.6)) == {
        "rounds": 4,
        "seconds": 9.0,
        "bytes_up": 100,
        "bytes_down": 200,
        "metric": "accuracy",
        "last": 0.6,
        "best": 0.7,
        "rounds_to_target": 2,
        "bytes_to_target": 10 + 20 + 11 + 21,
        "seconds_to_target": 3.0,
        "metrics.accuracy": 0.6,
        "metrics.loss": 0.5,
        "metrics.train_loss": 1.0,
    }


@pytest.mark.parametrize("target", [None, 0.9])
def test_a_target_that_is_not_set_or_not_reached_has_no_figures(target):
    found = figures(LEARNED, Stop(target=target))
    assert [found[f"{what}_to_target"] for what in ("rounds", "bytes", "seconds")] == [None] * 3


def test_of_losses_the_lowest_is_the_best_and_what_is_no_number_is_left_out():
    found = figures(result(({"loss": 2.0}, 1, 1, 1.0), ({"loss": None}, 1, 1, 1.0)), Stop(metric="loss", target=3.0))
    assert (found["last"], found["best"], found["rounds_to_target"]) == (2.0, 2.0, 1)


def test_a_run_that_was_never_evaluated():
    found = figures(result(({"train_loss": 1.0}, 1, 1, 1.0)), Stop())
    assert (found["last"], found["best"], found["metrics.train_loss"]) == (None, None, 1.0)


@pytest.fixture
def planned(tmp_path):
    runs = [
        Run(f"{variant}-{seed}", {"train.hypers.lr": lr, **settings}, seed, variant)
        for variant, lr, settings in (("one", 0.1, {}), ("two", 0.2, {"simulation.speed": [0.5, 1.0]}))
        for seed in (0, 1)
    ]
    return plan(federation(tmp_path), runs, {"stop.target": 0.6})


def test_a_line_for_each_run_that_has_a_result_with_the_settings_that_it_had(planned):
    found = rows(planned, {"one-1": LEARNED, "two-0": LEARNED})
    assert swept(planned) == ("train.hypers.lr", "simulation.speed")
    assert list(found[0])[:6] == ["name", "variant", "seed", "train.hypers.lr", "simulation.speed", "rounds"]
    assert [list(row.values())[:5] for row in found] == [
        ["one-1", "one", 1, 0.1, "[1.0, 1.0]"],
        ["two-0", "two", 0, 0.2, "[0.5, 1.0]"],
    ]


def test_mean_and_deviation_over_the_seeds_of_a_setting(planned):
    never = result(({"accuracy": 0.2}, 1, 2, 1.0))
    found = rows(planned, {"one-0": LEARNED, "one-1": never, "two-0": LEARNED})
    one, two = summary(found, swept(planned))
    assert (one["variant"], one["train.hypers.lr"], one["runs"], one["reached"]) == ("one", 0.1, 2, 1)
    assert one["last_mean"] == pytest.approx(0.4)
    assert one["last_std"] == pytest.approx(0.4 / math.sqrt(2))
    assert (one["rounds_to_target_mean"], one["rounds_to_target_std"]) == (2, None)
    assert one["metrics.loss_mean"] == 0.5
    assert (two["runs"], two["best_mean"], two["best_std"]) == (1, 0.7, None)
    assert "name" not in one
    assert "seed_mean" not in one
