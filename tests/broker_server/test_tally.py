import itertools
import math
import random

import pytest

from broker_server.metrics import fairness, higher_is_better, names
from broker_server.tally import Tally


def tally(*results: dict[str, float], prefix: str = "sum.") -> Tally:
    found = Tally()
    for sums in results:
        found.add(int(sums.get("count", 1)), {prefix + name: value for name, value in sums.items()})
    return found


def test_the_mean_over_samples_and_over_clients_by_hand():
    # 9 of 10, 1 of 2 and 20 of 40: 30 of 52 samples, and (0.9 + 0.5 + 0.5) / 3 over clients.
    told = tally(*({"correct": right, "count": count} for right, count in ((9, 10), (1, 2), (20, 40))))
    assert told.metrics("client_") == {"client_accuracy": 30 / 52}
    assert told.fairness("client_") == pytest.approx(
        {
            "client_accuracy_mean": 1.9 / 3,
            "client_accuracy_worst": 0.5,
            "client_accuracy_spread": math.sqrt((2 * (0.5 - 1.9 / 3) ** 2 + (0.9 - 1.9 / 3) ** 2) / 3),
        },
        rel=1e-15,
    )


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (39, 3), (100, 10)])
def test_the_worst_are_a_tenth_of_the_clients_and_of_losses_the_highest(clients, worst):
    values = [float(number) for number in range(clients)]
    random.Random(clients).shuffle(values)
    assert fairness("accuracy", values)["accuracy_worst"] == (worst - 1) / 2
    assert fairness("loss", values)["loss_worst"] == clients - 1 - (worst - 1) / 2


def test_clients_that_are_alike_have_no_spread_and_nobody_has_no_figures():
    assert fairness("accuracy", [0.1] * 7)["accuracy_spread"] == pytest.approx(0, abs=1e-17)
    assert fairness("accuracy", []) == {}
    assert Tally().metrics("client_") == Tally().fairness("client_") == {}


def test_the_order_of_arrival_changes_no_bit():
    dice = random.Random(3)
    results = [
        {
            "correct": dice.random() * 1e8,
            "loss": dice.uniform(-1, 1) * 10 ** dice.randint(-9, 9),
            "count": dice.random(),
        }
        for _ in range(50)
    ]
    expected = tally(*results)
    for seed in range(20):
        random.Random(seed).shuffle(results)
        found = tally(*results)
        assert found.metrics("") == expected.metrics("")
        assert found.fairness("") == expected.fairness("")


def test_who_leaves_a_sum_out_or_counts_nothing_is_not_counted_for_it():
    told = tally({"correct": 1, "loss": 4, "count": 2}, {"loss": 1, "count": 8}, {"correct": 5, "loss": 5, "count": 0})
    assert told.metrics("") == {"accuracy": 1 / 2, "loss": 5 / 10}
    assert (told.results, told.fairness("")["accuracy_mean"]) == (3, 0.5)


def test_a_word_before_the_sums_makes_metrics_of_their_own():
    told = tally({"correct": 1, "count": 4})
    told.add(4, {"sum.correct": 3.0, "sum.count": 4.0, "personal.sum.correct": 4.0, "personal.sum.count": 5.0})
    told.add(4, {"checksum.correct": 3.0, "personal.sum.loss": 1.0, "samples": 4.0})
    assert told.metrics("client_") == {"client_accuracy": 4 / 8, "personal_accuracy": 4 / 5}
    assert told.fairness("client_")["personal_accuracy_worst"] == 0.8
    assert told.fairness("client_")["client_accuracy_worst"] == 0.25


def test_no_number_that_a_client_says_ends_the_server():
    for values in itertools.product((1.7e308, -1.7e308, 5e-324, 1.0), repeat=3):
        told = tally(*({"loss": value, "count": 5e-324} for value in values))
        assert told.metrics("").keys() == {"loss"}
        assert told.fairness("").keys() == {"loss_mean", "loss_worst", "loss_spread"}


def test_which_values_are_better():
    assert [higher_is_better(name) for name in ("accuracy", "client_accuracy_worst", "client_accuracy_spread")] == [
        True,
        True,
        False,
    ]
    assert not any(map(higher_is_better, ("client_loss_worst", "squared_error", "loss")))
    assert {"accuracy", "client_accuracy_worst", "client_loss_spread", "loss"} <= names(["correct"])
