import numpy as np
import pytest
import torch

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.fednova import fednova
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.weighting import Report
from edge_client.errors import ConfigError
from tests.broker_server.aggregation.sums import total

RULES = {
    "sgd": LocalTraining("sgd", 0.1),
    "momentum": LocalTraining("momentum", 0.1, 0.9),
    "nesterov": LocalTraining("nesterov", 0.1, 0.9),
    "proximal": LocalTraining("sgd", 0.1, 0.0, 2.0),
    "proximal and momentum": LocalTraining("momentum", 0.1, 0.5, 0.3),
}


def report(steps: float, weight: float = 1.0) -> Report:
    return Report(scalars={"steps": steps}, weight=weight)


@pytest.mark.parametrize("local", RULES.values(), ids=RULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_distance_is_what_torch_goes_with_gradients_of_one(local, steps):
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [weight], lr=local.learning_rate, momentum=local.momentum, nesterov=local.optimizer == "nesterov"
    )
    for _ in range(steps):
        weight.grad = torch.ones(1, dtype=torch.float64) + local.proximal * weight.detach()
        optimizer.step()
    assert local.distance(steps) == pytest.approx(-weight.item() / local.learning_rate, rel=1e-12)


def test_the_distances_of_the_paper():
    # Section 4.2: momentum's norm is (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), the proximal term's
    # (1 - (1 - eta mu)^tau) / (eta mu).
    momentum = (7 - 0.9 * (1 - 0.9**7) / (1 - 0.9)) / (1 - 0.9)
    assert RULES["momentum"].distance(7) == pytest.approx(momentum)
    assert RULES["proximal"].distance(7) == pytest.approx((1 - 0.8**7) / 0.2)
    assert RULES["sgd"].distance(7) == 7.0


def test_by_hand():
    # Two clients of equal weight took 1 and 3 steps: tau_eff = 2, and the directions are 2 / 1 and 9 / 3.
    rule = fednova(RULES["sgd"])
    assert rule.finish(total(rule, [(np.float32([2]), report(1)), (np.float32([9]), report(3))])).tolist() == [5.0]


def test_with_even_steps_it_is_fedavg():
    rng = np.random.default_rng(3)
    entries = [(rng.normal(size=9).astype(np.float32), report(5, weight)) for weight in (1.0, 4.0, 2.5)]
    rule = fednova(RULES["momentum"])
    np.testing.assert_allclose(rule.finish(total(rule, entries)), fedavg().finish(total(fedavg(), entries)), rtol=1e-6)


def test_uneven_steps_find_the_optimum_that_fedavg_misses():
    """Wang et al., figure 2: of quadratics ``(x - e_k)^2 / 2`` the mean has its optimum at the mean of the ``e_k``."""
    optima, steps, rate = np.array([-1.0, 3.0]), (30, 2), 0.01
    found = {}
    for name, rule in (("fedavg", fedavg()), ("fednova", fednova(LocalTraining("sgd", rate)))):
        model = 0.0
        for _ in range(400):
            # SGD with a small rate, in closed form: x moves to e by (1 - rate)^tau.
            moved = [(1 - (1 - rate) ** tau) * (optimum - model) for optimum, tau in zip(optima, steps, strict=True)]
            entries = [(np.float32([by]), report(tau)) for by, tau in zip(moved, steps, strict=True)]
            model += rule.finish(total(rule, entries)).item()
        found[name] = model
    assert abs(found["fednova"] - optima.mean()) < 0.2
    assert abs(found["fedavg"] - optima.mean()) > 1.5


FALLING = LocalTraining("sgd", 0.5, falls=True)


def told(steps: float, distance: float) -> Report:
    return Report(scalars={"steps": steps, "distance": distance})


def test_with_a_falling_rate_the_distance_is_the_sum_of_the_rates_over_the_first():
    # Rates 0.5 and 0.25 are 1.5 of the first, 0.5 alone is 1: tau_eff = 1.25, the directions 3 / 1.5 and 8 / 1.
    rule = fednova(FALLING)
    found = rule.finish(total(rule, [(np.float32([3]), told(2, 0.75)), (np.float32([8]), told(1, 0.5))]))
    assert found.tolist() == [1.25 * (2 + 8) / 2]


def test_by_hand_on_a_slope_that_is_the_same_everywhere_clients_agree_whatever_their_steps():
    """With gradient -1 everywhere each update is its distance, so that the normalized mean is their mean."""
    rule, rates = fednova(FALLING), 0.5 * (1 - np.arange(8) / 8)
    entries = [(np.float32([rates[:steps].sum()]), told(steps, rates[:steps].sum())) for steps in (2, 5, 8)]
    mean = np.mean([rates[:steps].sum() for steps in (2, 5, 8)])
    assert rule.finish(total(rule, entries)).item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(("says", "counts"), [(0.0, 0.4), (-9.0, 0.4), (1e30, 4.0), (1.0, 2.0)])
def test_what_a_client_says_of_its_distance_makes_its_update_at_most_ten_times_as_long(says, counts):
    rule = fednova(FALLING)
    found = rule.finish(total(rule, [(np.float32([1]), told(4, says)), (np.float32([0]), told(4, 2.0))]))
    assert found.item() == pytest.approx((counts + 4) / 2 / counts / 2)


def test_a_client_that_knows_of_no_schedule_counts_by_its_steps():
    rule, old = fednova(FALLING), Report(scalars={"steps": 4.0})
    found = rule.finish(total(rule, [(np.float32([4]), old), (np.float32([4]), told(4, 2.0))]))
    assert found.item() == pytest.approx(LocalTraining("sgd", 0.5).distance(4))


def test_an_update_of_no_steps_counts_as_one_that_led_nowhere():
    # It stopped early, and the model as received was the best.
    for local in (RULES["sgd"], FALLING):
        rule = fednova(local)
        found = rule.finish(total(rule, [(np.float32([0]), told(0, 0.0)), (np.float32([6]), told(3, 1.5))]))
        assert found.tolist() == [2 * (0 + 6 / 3) / 2]


@pytest.mark.parametrize(
    ("local", "says"),
    [
        (
            LocalTraining("momentum", 0.1, 0.9, falls=True),
            "where the bundle's optimizer is 'momentum'; expected \"sgd\"",
        ),
        (LocalTraining("sgd", 0.1, 0.0, 0.5, falls=True), r"and a proximal term, train\.hypers\.mu = 0\.5; expected 0"),
        (LocalTraining("sgd", 0.1, falls=True, decays=True), r"not \"constant\" and a train\.decay; expected one"),
        (LocalTraining("sgd", 0.1, 0.0, 0.5, decays=True), r"with a train\.decay and a proximal term, .* = 0\.5"),
        (LocalTraining("sgd", 0.0, falls=True), r"train\.hypers\.lr is 0; fednova expects"),
    ],
)
def test_rates_that_it_cannot_normalize_are_refused(local, says):
    with pytest.raises(ConfigError, match=says):
        fednova(local)


def test_a_rate_that_falls_over_the_rounds_is_the_same_for_all_of_a_round():
    fednova(LocalTraining("nesterov", 0.1, 0.9, decays=True))


def test_what_is_no_sum_of_gradients_is_refused():
    with pytest.raises(ConfigError, match="fednova cannot be combined with the bundle's optimizer 'adam'"):
        fednova(LocalTraining("adam"))
