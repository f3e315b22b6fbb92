import numpy as np
import pytest

from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.scaffold import ALGORITHM, scaffold
from broker_server.aggregation.variates import Side, Variates, beside
from broker_server.aggregation.weighting import Report
from edge_client.errors import ConfigError
from edge_client.learning import variates
from edge_client.wire.messages import DISTANCE
from tests.broker_server.aggregation.sums import total


def report(distance: float, weight: float = 1.0) -> Report:
    return Report(weight=weight, scalars={DISTANCE: distance})


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def added(kept: Variates, updates: list[tuple[np.ndarray, Report]]) -> Side:
    rule = beside(kept.factor)
    found = total(rule, updates)
    return Side(rule.finish(found), int(found.sums[0]))


def test_by_hand():
    """Two of four clients, whose mean gradients were 2 and 6 when c was 1 and their own were 0 and 3.

    They come to -d_i (2 - 0 + 1) and -d_i (6 - 3 + 1), and c grows by (2 - 0 + 6 - 3) / 4.
    """
    kept = scaffold(4)
    updates = [(vector(-0.1 * 3), report(0.1)), (vector(-0.5 * 4), report(0.5, weight=9.0))]
    side = added(kept, updates)
    direction, state = kept.step((vector(4.0),), vector(-1.0), side, vector(1.0))
    assert direction == vector(-1.0)
    assert kept.control is not None
    np.testing.assert_allclose(kept.control(state), [1 + 5 / 4], rtol=1e-6)


def test_who_made_no_step_has_no_new_estimate():
    kept = scaffold(4)
    side = added(kept, [(vector(0.0), report(0.0)), (vector(-0.3), report(0.1))])
    assert side.updates == 1
    _, state = kept.step((vector(4.0),), vector(-0.15), side, vector(1.0))
    np.testing.assert_allclose(state[0], [4 - 1 + 3], rtol=1e-6)
    nothing = added(kept, [(vector(0.0), report(0.0))])
    assert kept.step((vector(4.0),), vector(0.0), nothing, vector(1.0))[1] == (vector(4.0),)


def test_more_clients_share_the_same_sum():
    assert scaffold(10).control((vector(20.0),)) == vector(2.0)
    assert scaffold(40).control((vector(20.0),)) == vector(0.5)


CURVATURES, OPTIMA = np.array([1.0, 3.0, 10.0], np.float32), np.array([-4.0, 2.0, 5.0], np.float32)
BEST = float(CURVATURES @ OPTIMA / CURVATURES.sum())
"""Of the mean of ``a_i / 2 (x - b_i)^2``."""


def played(rounds: int, corrected: bool, who: int = 3, weights: tuple[float, ...] = (1, 1, 1)) -> float:
    """Where rounds of uneven quadratics lead, of ``who`` clients each: 5 local steps of 0.05."""
    rng, kept = np.random.default_rng(0), scaffold(3)
    state, own, x = kept.init(1), [None] * 3, vector(0.0)
    for _ in range(rounds):
        control = kept.control(state)
        moved, updates = [], []
        chosen = rng.permutation(3)[:who]
        for client in chosen:
            pull = variates.scaffold(own[client], control) if corrected else vector(0.0)
            y = x.copy()
            for _ in range(5):
                y = y - np.float32(0.05) * (CURVATURES[client] * (y - OPTIMA[client]) + pull)
            own[client] = variates.following(pull, y - x, 1 / 0.25)
            moved.append(y - x)
            updates.append((y - x, report(0.25)))
        side = added(kept, updates)
        mean = np.average(moved, axis=0, weights=[weights[client] for client in chosen]).astype(np.float32)
        direction, state = kept.step(state, mean, side, control)
        x = x + direction
    return float(x[0])


@pytest.mark.parametrize("who", [3, 2, 1])
def test_uneven_quadratics_come_to_their_optimum(who):
    assert played(300, corrected=True, who=who) == pytest.approx(BEST, abs=1e-4)


@pytest.mark.parametrize("who", [3, 2])
def test_weights_change_the_way_and_not_where_it_leads(who):
    assert played(400, corrected=True, who=who, weights=(1, 5, 2)) == pytest.approx(BEST, abs=1e-3)


def test_fedavg_with_the_same_steps_stays_off():
    assert abs(played(300, corrected=False) - BEST) > 0.3


def test_adam_s_steps_are_no_sums_of_gradients():
    with pytest.raises(
        ConfigError, match=r"scaffold cannot be combined with the bundle's optimizer 'adam', .*nesterov"
    ):
        ALGORITHM.make(ALGORITHM.options(), LocalTraining("adam", 0.1))
    with pytest.raises(ConfigError, match="expects a learning rate above 0"):
        ALGORITHM.make(ALGORITHM.options(), LocalTraining("sgd", 0.0))


@pytest.mark.parametrize(
    "local", [LocalTraining(), LocalTraining("nesterov", 0.2, 0.9), LocalTraining("sgd", 1, 0, 1.5)]
)
def test_the_least_distance_is_less_than_any_that_is_gone(local):
    hypers = {"lr": local.learning_rate, "momentum": local.momentum, "mu": local.proximal}
    least = ALGORITHM.least(local)[DISTANCE]
    gone = [variates.distance(local.optimizer, hypers, steps) for steps in range(1, 30)]
    assert 0.9 * min(gone) < least < min(gone)
