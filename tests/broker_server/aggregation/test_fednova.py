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


def test_what_is_no_sum_of_gradients_is_refused():
    with pytest.raises(ConfigError, match="fednova cannot be combined with the bundle's optimizer 'adam'"):
        fednova(LocalTraining("adam"))
