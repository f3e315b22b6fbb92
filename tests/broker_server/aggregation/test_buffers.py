import msgspec
import numpy as np
import pytest

from broker_server.aggregation.buffers import BufferAggregator
from edge_client.bundle import Bundle
from edge_client.errors import CodecError, TrainingError
from edge_client.manifest import Manifest, Parameter
from tests.toy import toy_bundle

MANIFEST: Manifest = msgspec.structs.replace(
    Bundle.from_bytes(toy_bundle()).manifest,
    parameters=(
        Parameter("mean", (2,), "buffer"),
        Parameter("seen", (), "buffer", "int64"),
        Parameter("other", (3,), "frozen"),
        Parameter("on", (1,), "buffer", "bool"),
    ),
)


def test_floats_are_averaged_by_samples_and_integers_take_the_maximum() -> None:
    aggregator = BufferAggregator.of(MANIFEST)
    state = aggregator.init()
    state = aggregator.add(state, np.array([1, 2, 7, 0], np.float32), 10)
    state = aggregator.add(state, np.array([3, -2, 5, 1], np.float32), 30)
    np.testing.assert_array_equal(aggregator.finish(state), np.array([2.5, -1, 7, 1], np.float32))


def test_what_does_not_fit_and_what_is_empty() -> None:
    aggregator = BufferAggregator.of(MANIFEST)
    with pytest.raises(CodecError, match="3 buffer values; expected 4"):
        aggregator.add(aggregator.init(), np.zeros(3, np.float32), 1)
    with pytest.raises(TrainingError):
        aggregator.finish(aggregator.init())
