import pytest

from broker_server.aggregation.schedules import schedule

KINDS = {
    "constant": (schedule("constant"), [1, 1, 1, 1, 1, 1]),
    "step": (schedule("step", factor=0.5, every=2), [1, 1, 0.5, 0.5, 0.25, 0.25]),
    "exponential": (schedule("exponential", factor=0.25, every=2), [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
    "linear": (schedule("linear", rounds=4), [1, 0.75, 0.5, 0.25, 0, 0]),
    "linear to a rest": (schedule("linear", rounds=4, least=0.2), [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
    "cosine": (schedule("cosine", rounds=4), [1, 0.8535534, 0.5, 0.1464466, 0, 0]),
    "warm": (schedule("constant", warmup=3), [0.25, 0.5, 0.75, 1, 1, 1]),
    "warm and down": (schedule("linear", warmup=1, rounds=5), [0.5, 1, 0.75, 0.5, 0.25, 0]),
    "no rounds are left": (schedule("linear", warmup=5, rounds=5), [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
}


@pytest.mark.parametrize(("factor", "expected"), KINDS.values(), ids=KINDS)
def test_by_hand(factor, expected):
    assert [factor(count) for count in range(6)] == pytest.approx(expected)
