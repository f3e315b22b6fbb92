import numpy as np
import pytest

from broker_server.aggregation.feddyn import feddyn
from broker_server.aggregation.variates import Side
from broker_server.aggregation.weighting import Report
from edge_client.learning import variates
from tests.broker_server.aggregation.test_scaffold import BEST, CURVATURES, OPTIMA, added, vector


def test_by_hand():
    """Two of four clients, alpha 0.5, h = -0.8 before: updates of 2 and 4 make it -0.8 - 0.5 / 4 * 6 = -1.55."""
    kept, alpha = feddyn(4), 0.5
    updates = [(vector(2.0), Report(weight=1.0)), (vector(4.0), Report(weight=7.0))]
    side = added(kept, updates)
    assert side.total == vector(6.0), "whatever they weigh"
    direction, state = kept.step((vector(4 * 0.8 / alpha),), vector(3.0), side, None)
    np.testing.assert_allclose(-alpha * state[0] / 4, [-1.55], rtol=1e-6)
    np.testing.assert_allclose(direction, [3.0 + 1.55 / alpha], rtol=1e-6)
    assert kept.control is None


@pytest.mark.parametrize("steps", [2, 5, 40])
@pytest.mark.parametrize("who", [3, 1])
def test_uneven_quadratics_come_to_their_optimum(who, steps):
    """However exactly clients solve their problem."""
    rng, kept, alpha = np.random.default_rng(0), feddyn(3), np.float32(4.0)
    state, own, x = kept.init(1), [None] * 3, vector(0.0)
    for _ in range(300):
        moved = []
        for client in rng.permutation(3)[:who]:
            pull = variates.feddyn(own[client])
            y = x.copy()
            for _ in range(steps):
                gradient = CURVATURES[client] * (y - OPTIMA[client]) + alpha * (y - x)
                y = y - np.float32(0.05) * (gradient if pull is None else gradient + pull)
            own[client] = variates.following(pull, y - x, float(alpha))
            moved.append(y - x)
        side = Side(np.sum(moved, axis=0), len(moved))
        direction, state = kept.step(state, np.mean(moved, axis=0), side, None)
        x = x + direction
    assert float(x[0]) == pytest.approx(BEST, abs=1e-3)
