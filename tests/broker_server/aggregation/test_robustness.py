"""A fifth of the clients attack: what robust rules make of it, beside the mean."""

import numpy as np
import pytest

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.geometric_median import Weiszfeld, geometric_median
from broker_server.aggregation.krum import krum, multi_krum
from broker_server.aggregation.median import median, trimmed_mean
from broker_server.aggregation.weighting import Report, bounded
from tests.broker_server.aggregation.stacked import Stacked
from tests.byzantine import ATTACKS, attacked, label_flip, little_is_enough

RULES = {
    "median": median(),
    "trimmed-mean": trimmed_mean(0.2),
    "krum": krum(0.2),
    "multi-krum": multi_krum(0.2),
    "geometric-median": geometric_median(Weiszfeld()),
}
CLIENTS, ATTACKERS = 30, 6
DIRECTION = np.random.default_rng(1).normal(0, 0.5, 400)
HONEST = (DIRECTION + np.random.default_rng(2).normal(0, 0.5, (CLIENTS, 400))).astype(np.float32)


def error(aggregate) -> float:
    """Distance from where honest clients would go, in lengths of that."""
    return float(np.linalg.norm(aggregate - DIRECTION) / np.linalg.norm(DIRECTION))


def mean(rows, stage=lambda report, update: report):
    rule = fedavg()
    state = rule.init(rows.shape[1])
    for row in rows:
        state = rule.add(state, row, stage(Report(), row))
    return rule.finish(state)


@pytest.mark.parametrize("attack", ["sign flip", "scaled"])
def test_the_mean_is_lost(attack):
    assert error(mean(attacked(HONEST, ATTACKERS, ATTACKS[attack]))) > 2


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_robust_rules_stay_near_the_honest_mean(rule, attack):
    # Krum is one update alone, whose own noise is as long as the direction.
    limit = 1.3 if rule is RULES["krum"] else 0.5
    assert error(rule.finish(Stacked.of(attacked(HONEST, ATTACKERS, ATTACKS[attack])))) < limit


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_without_attackers_they_are_near_the_mean(rule):
    assert error(rule.finish(Stacked.of(HONEST))) < (1.2 if rule is RULES["krum"] else 0.3)


def test_bounded_norms_leave_a_shorter_step_in_the_right_direction():
    rows = attacked(HONEST, ATTACKERS, ATTACKS["sign flip"])
    found = mean(rows, bounded(float(np.median(np.linalg.norm(rows, axis=1)))))
    assert found @ DIRECTION / (np.linalg.norm(found) * np.linalg.norm(DIRECTION)) > 0.8


def test_little_is_enough_by_hand():
    # n = 50, m = 12: s = 26 - 12 = 14, Phi(z) = (38 - 14) / 38, so z = 0.336; the mean of 1 and 3 less z times 1.
    own = np.repeat(np.float32([[1], [3]]), 6, axis=0)
    assert little_is_enough(own, 50) == pytest.approx(np.full((12, 1), 2 - 0.3360), abs=1e-3)


def test_labels_are_flipped():
    assert label_flip(np.arange(10), 10).tolist() == list(range(9, -1, -1))
