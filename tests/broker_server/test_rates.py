import math

import msgspec
import pytest

from broker_server.rates import tolerance, update_plan
from broker_server.records import Task
from edge_client.wire import messages as m
from tests.broker_server.desk import settings

SAMPLES = {"a": 20, "b": 40, "c": 140, "d": 200}
TOTAL = 400
PACE = 0.003


def cohort(value: float = 2.0, **more: object) -> dict[str, object]:
    return {"target": "cohort", "value": value, **more}


def asked(config, pace=PACE, samples=SAMPLES, updates=4, uplink=0.0) -> dict[str, m.UpdatePlan]:
    plan = tolerance(config, pace, samples.values(), updates)
    task = Task(epoch=1, task=1, round=1, kind="train", version=0, cohort=tuple(samples), plan=plan, opened=0.0)
    return {client: update_plan(config, task, client, count, uplink) for client, count in samples.items()}


def test_every_clients_noise_has_the_same_part_in_the_aggregate():
    plans = asked(settings(codec=cohort()))
    for client, count in SAMPLES.items():
        assert plans[client].target == "absolute"
        assert plans[client].value == pytest.approx(2.0 * PACE * TOTAL / (count * math.sqrt(4)))
    # The noise of the sum is that of one step of value * pace, however many have told their part of it.
    noise = sum((count / TOTAL * plans[client].value) ** 2 for client, count in SAMPLES.items())
    assert noise == pytest.approx((2.0 * PACE) ** 2)


def test_with_uniform_weights_all_have_the_same_step():
    plans = asked(settings(codec=cohort(), aggregation={"weights": "uniform"}))
    assert [plan.value for plan in plans.values()] == [pytest.approx(2.0 * PACE * math.sqrt(4))] * 4


def test_a_cohort_of_one_is_told_the_step_of_the_aggregate():
    (plan,) = asked(settings(codec=cohort()), samples={"a": 70}, updates=1).values()
    assert plan.value == pytest.approx(2.0 * PACE)


@pytest.mark.parametrize("pace", [0.0, math.nan])
def test_before_anything_is_known_of_aggregates_the_noise_of_each_update_is_a_tenth(pace):
    plans = asked(settings(codec=cohort(clients={"a": 9.0})), pace=pace)
    assert set(plans.values()) == {m.UpdatePlan("quantized", "nmse", 0.1)}


def test_clients_may_have_other_values_and_slow_links_bounds():
    codec = cohort(clients={"b": 6.0}, upload_seconds=10.0, feedback="length")
    plain, other = asked(settings(codec=cohort())), asked(settings(codec=codec), uplink=30.0)
    assert other["b"].value == pytest.approx(3 * plain["b"].value)
    assert [other[client].value for client in "acd"] == [plain[client].value for client in "acd"]
    assert {(plan.limit, plan.feedback) for plan in other.values()} == {(300, "length")}


def test_one_clients_claim_does_not_silence_the_others():
    honest = {f"c{number}": 10 for number in range(9)}
    plans = asked(settings(codec=cohort()), samples=honest | {"liar": 2**48}, updates=10)
    fair = asked(settings(codec=cohort()), samples=honest | {"fair": 10}, updates=10)
    assert plans["c0"].value < 2 * fair["c0"].value


def test_a_client_without_samples_counts_as_with_one():
    plans = asked(settings(codec=cohort()), samples={"a": 0, "b": 1}, updates=2)
    assert plans["a"].value == plans["b"].value == pytest.approx(2.0 * PACE * math.sqrt(2))


@pytest.mark.parametrize("pace", [1e-300, 1e300])
def test_any_step_can_be_sent(pace):
    for plan in asked(settings(codec=cohort()), pace=pace).values():
        assert msgspec.convert(msgspec.to_builtins(plan), m.UpdatePlan) == plan


def test_other_targets_say_nothing_with_a_task():
    assert tolerance(settings(codec={"value": 0.2}), PACE, SAMPLES.values(), 4) == b""
    assert set(asked(settings(codec={"value": 0.2})).values()) == {m.UpdatePlan("quantized", "nmse", 0.2)}


def test_a_task_of_other_settings_is_told_as_the_settings_are_now():
    config, before = settings(codec={"value": 0.2}), settings(codec=cohort())
    plan = tolerance(before, PACE, SAMPLES.values(), 4)
    task = Task(epoch=1, task=1, round=1, kind="train", version=0, cohort=("a",), plan=plan, opened=0.0)
    assert update_plan(config, task, "a", 20, 0.0) == m.UpdatePlan("quantized", "nmse", 0.2)
