import numpy as np
import pytest

from broker_server.aggregation.streaming import PartialSum, fedavg
from edge_client.errors import CodecError, TrainingError

SEED = 20170217


def updates(count: int = 5, size: int = 40_000) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(SEED)
    return [(rng.standard_normal(size, dtype=np.float32), int(rng.integers(1, 900))) for _ in range(count)]


def total(aggregator, entries) -> PartialSum:
    state = aggregator.init(entries[0][0].size)
    for update, samples in entries:
        state = aggregator.add(state, update, samples)
    return state


def test_by_hand():
    aggregator = fedavg()
    state = total(aggregator, [(np.float32([1, 2]), 1), (np.float32([5, -2]), 3)])
    assert (state.weight, state.updates, state.samples) == (4.0, 2, 4)
    mean = aggregator.finish(state)
    assert mean.dtype == np.float32
    assert mean.tolist() == [4.0, -1.0]


def test_uniform_ignores_samples():
    aggregator = fedavg("uniform")
    assert aggregator.finish(total(aggregator, [(np.float32([1]), 0), (np.float32([5]), 900)])).tolist() == [3.0]


def test_equals_the_weighted_mean():
    entries = updates()
    aggregator = fedavg()
    expected = np.average(
        np.stack([update for update, _ in entries]).astype(np.float64),
        axis=0,
        weights=[samples for _, samples in entries],
    )
    np.testing.assert_array_equal(aggregator.finish(total(aggregator, entries)), expected.astype(np.float32))


def test_a_replay_gives_the_same_bits():
    aggregator = fedavg()
    first, second = (aggregator.finish(total(aggregator, updates())) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_partial_sums_merge():
    entries, aggregator = updates(), fedavg()
    left, right = total(aggregator, entries[:2]), total(aggregator, entries[2:])
    before = right.total.copy()
    merged = aggregator.merge(left, right)
    whole = total(aggregator, entries)
    assert (merged.weight, merged.updates, merged.samples) == (whole.weight, whole.updates, whole.samples)
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(right.total, before)


def test_updates_are_not_written_to():
    (update, samples), *_ = updates(1)
    update.flags.writeable = False
    fedavg().add(fedavg().init(update.size), update, samples)


@pytest.mark.parametrize("samples", [[], [0], [0, 0]])
def test_nothing_has_no_mean(samples):
    aggregator = fedavg()
    state = aggregator.init(1)
    for count in samples:
        state = aggregator.add(state, np.float32([1]), count)
    with pytest.raises(TrainingError, match=f"{len(samples)} updates weigh nothing together"):
        aggregator.finish(state)


def test_what_cannot_be_added():
    aggregator = fedavg()
    state = aggregator.init(3)
    with pytest.raises(CodecError, match=r"update is float32 \[2\]; expected float32 \[3\]"):
        aggregator.add(state, np.zeros(2, np.float32), 1)
    with pytest.raises(CodecError, match=r"update is float64 \[3\]; expected float32 \[3\]"):
        aggregator.add(state, np.zeros(3), 1)
    with pytest.raises(TrainingError, match="-1 samples"):
        aggregator.add(state, np.zeros(3, np.float32), -1)
    with pytest.raises(CodecError, match="3 and 4 parameters"):
        aggregator.merge(state, aggregator.init(4))
    assert not state.total.any()
