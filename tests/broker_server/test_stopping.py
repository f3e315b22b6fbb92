import math

import msgspec
import pytest

from broker_server.config import Stop
from broker_server.records import Round
from broker_server.stopping import Progress


def result(number: int = 1, *, seconds: float = 1.0, moved: int = 10, **metrics: float) -> Round:
    return Round(
        round=number,
        version=number,
        clients=1,
        samples=1,
        seconds=seconds,
        bytes_up=moved,
        bytes_down=moved,
        metrics=metrics,
    )


def test_nothing_holds_at_first():
    assert Progress(Stop(rounds=1, target=0.5, patience=1, seconds=1.0, bytes=1)).reason() is None
    assert Progress(Stop(rounds=0), [result(n) for n in range(200)]).reason() is None


@pytest.mark.parametrize(
    ("stop", "before", "last", "words"),
    [
        (Stop(rounds=2), [result()], result(2), "2 rounds"),
        (Stop(target=0.9), [result(accuracy=0.8)], result(accuracy=0.9), "reaches the target 0.9"),
        (Stop(metric="loss", target=0.1), [result(loss=0.2)], result(loss=0.1), "loss 0.1000 reaches"),
        (Stop(patience=2), [result(accuracy=0.5), result(accuracy=0.5)], result(accuracy=0.4), "2 evaluations"),
        (Stop(patience=1), [result(accuracy=0.5)], result(accuracy=math.nan), "1 evaluations"),
        (Stop(seconds=2.5), [result(), result()], result(), "3 s"),
        (Stop(bytes=60), [result(), result()], result(), "60 bytes"),
    ],
)
def test_each_condition(stop, before, last, words):
    progress = Progress(stop, before)
    assert progress.reason() is None
    progress.add(last)
    assert words in str(progress.reason())


def test_the_best_so_far():
    progress = Progress(Stop())
    values = [None, 0.3, 0.2, 0.3, 0.4, None, math.nan]
    marks = [progress.add(result(**({} if value is None else {"accuracy": value}))) for value in values]
    assert marks == [True, True, False, False, True, False, False]


def test_lower_is_better_for_losses():
    progress = Progress(Stop(metric="loss"))
    assert [progress.add(result(loss=value)) for value in (2.0, 3.0, 1.0)] == [True, False, True]


def test_rounds_without_a_measurement_cost_no_patience():
    progress = Progress(Stop(patience=1), [result(accuracy=0.5), result(), result(), result()])
    assert progress.reason() is None


def test_time_of_earlier_runs_counts():
    assert Progress(Stop(seconds=10.0), [result(1, seconds=11.0)]).reason() == "11 s have passed"


def test_evaluations_of_a_model_in_service_are_no_rounds_of_training():
    progress = Progress(Stop(rounds=2, target=0.9, patience=1, seconds=5.0, bytes=100))
    progress.add(result(1, accuracy=0.5))
    for number in range(2, 9):
        served = msgspec.structs.replace(result(number, seconds=9.0, moved=999, accuracy=0.99), clients=0)
        assert not progress.add(served)
    assert progress.reason() is None
    assert progress.add(result(9, accuracy=0.6)), "is the best so far"
    assert progress.reason() == "2 rounds are done"
