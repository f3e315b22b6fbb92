import itertools

import numpy as np
import pytest

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.fednova import fednova
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.qfedavg import qfedavg
from broker_server.aggregation.weighting import Report
from edge_client.errors import CodecError, TrainingError
from edge_client.wire.messages import RECEIVED_LOSS
from tests.broker_server.aggregation.sums import total, updates

RULES = {
    "fedavg": fedavg(),
    "fednova": fednova(LocalTraining(momentum=0.9, optimizer="momentum")),
    "qfedavg": qfedavg(2.0, 0.1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_replay_gives_the_same_bits(rule):
    first, second = (rule.finish(total(rule, updates())) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_partial_sums_merge_in_any_order_and_count_each_update_once(rule):
    entries = updates(6)
    whole = total(rule, entries)
    expected = rule.finish(whole)
    for order in itertools.permutations(range(3)):
        parts = [total(rule, entries[2 * part : 2 * part + 2]) for part in order]
        before = parts[1].total.copy()
        merged = rule.merge(rule.init(expected.size), parts[0])
        for part in parts[1:]:
            merged = rule.merge(merged, part)
        np.testing.assert_array_equal(parts[1].total, before)
        assert (merged.updates, merged.samples) == (whole.updates, whole.samples)
        assert merged.sums == pytest.approx(whole.sums, rel=1e-14)
        np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(rule.finish(merged), expected, rtol=1e-6, atol=1e-7)


def test_whole_weights_merge_exactly():
    rule = fedavg()
    entries = [(np.float32([0.1, -3.7]), Report(weight=float(weight), samples=weight)) for weight in (3, 70, 900)]
    sums = {
        rule.finish(rule.merge(total(rule, entries[:cut]), total(rule, entries[cut:]))).tobytes() for cut in (1, 2)
    } | {rule.finish(total(rule, entries)).tobytes()}
    assert len(sums) == 1


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_updates_are_not_written_to(rule):
    ((update, report),) = updates(1)
    update.flags.writeable = False
    rule.add(rule.init(update.size), update, report)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_nothing_has_no_mean(rule, count):
    state = rule.init(1)
    for _ in range(count):
        scalars = {"steps": 1.0, RECEIVED_LOSS: 1.0}
        state = rule.add(state, np.float32([1]), Report(samples=0, weight=0.0, scalars=scalars))
    with pytest.raises(TrainingError, match=f"{count} updates weigh nothing together"):
        rule.finish(state)


def test_what_cannot_be_added():
    rule = fedavg()
    state = rule.init(3)
    with pytest.raises(CodecError, match=r"update is float32 \[2\]; expected float32 \[3\]"):
        rule.add(state, np.zeros(2, np.float32), Report())
    with pytest.raises(CodecError, match=r"update is float64 \[3\]; expected float32 \[3\]"):
        rule.add(state, np.zeros(3), Report())
    with pytest.raises(CodecError, match="3 and 4 parameters"):
        rule.merge(state, rule.init(4))
    assert not state.total.any()
