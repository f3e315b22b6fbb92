import numpy as np
import pytest
import torch

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.qfedavg import qfedavg
from broker_server.aggregation.weighting import Report
from edge_client.wire.messages import RECEIVED_LOSS
from tests.broker_server.aggregation.sums import total


def report(loss: float, weight: float = 1.0, scale: float = 1.0) -> Report:
    return Report(scalars={RECEIVED_LOSS: loss}, weight=weight, scale=scale)


def test_by_hand():
    # q = 1, L = 2, one client: F = 3, update 0.5: D = 3 * 2 * 0.5 = 3, h = 1 * (2 * 0.5)^2 + 2 * 3 = 7.
    rule = qfedavg(1.0, 0.5)
    assert rule.finish(total(rule, [(np.float32([0.5]), report(3.0))])).item() == pytest.approx(3 / 7)
    # With a second, F = 1, update -1: D = -2, h = 4 + 2.
    entries = [(np.float32([0.5]), report(3.0)), (np.float32([-1]), report(1.0))]
    assert rule.finish(total(rule, entries)).item() == pytest.approx((3 - 2) / (7 + 6))


@pytest.mark.parametrize("q", [0.1, 1.0, 5.0])
def test_is_the_paper_s(q):
    """Algorithm 2 of Li et al., in float64, on logistic regression; its gradients come from autograd."""
    generator = torch.Generator().manual_seed(7)
    model, rate = torch.randn(4, generator=generator, dtype=torch.float64), 0.3
    entries, changes, curvatures = [], [], []
    for samples in (3, 8, 20):
        x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
        y = (torch.rand(samples, generator=generator) < 0.5).double()

        def loss(weight, x=x, y=y):
            return torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y)

        local = model.clone()
        for _ in range(5):
            local.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(local), local)
            local = (local - rate * gradient).detach()
        received = loss(model)
        change = (model - local) / rate
        changes.append(received**q * change)
        curvatures.append(q * received ** (q - 1) * change.norm() ** 2 + received**q / rate)
        entries.append(((local - model).float().numpy(), report(received.item())))
    expected = -sum(changes) / sum(curvatures)
    rule = qfedavg(q, rate)
    np.testing.assert_allclose(rule.finish(total(rule, entries)), expected.numpy(), rtol=1e-5, atol=1e-7)


def test_q_0_is_fedavg():
    rng = np.random.default_rng(3)
    entries = [(rng.normal(size=9).astype(np.float32), report(loss, 2 * loss, 0.5)) for loss in (0.0, 1.0, 4.0)]
    rule = qfedavg(0.0, 0.1)
    np.testing.assert_allclose(rule.finish(total(rule, entries)), fedavg().finish(total(fedavg(), entries)), rtol=1e-6)


def test_losses_become_more_even():
    """Two clients with ``F = (x - e)^2 / 2 + 0.1``, one with three times the weight: its optimum, or one in between."""
    found = {}
    for q in (0.0, 4.0):
        rule, model = qfedavg(q, 0.1), 0.0
        for _ in range(300):
            entries = [
                (np.float32([0.1 * (optimum - model)]), report((model - optimum) ** 2 / 2 + 0.1, weight))
                for optimum, weight in ((0.0, 3.0), (2.0, 1.0))
            ]
            model += rule.finish(total(rule, entries)).item()
        found[q] = model
    assert found[0.0] == pytest.approx(0.5, abs=1e-3)
    assert 0.7 < found[4.0] < 1.0


def test_a_client_without_loss_is_no_division_by_zero():
    rule = qfedavg(0.5, 0.1)
    assert np.isfinite(rule.finish(total(rule, [(np.float32([1]), report(0.0)), (np.float32([1]), report(1.0))]))).all()
