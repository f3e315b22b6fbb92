import numpy as np
import pytest

from broker_server.aggregation.optimizer import pack, sgd, unpack
from edge_client.errors import LedgerError

ONE = np.float32([1, -2])


def test_plain_fedavg_takes_the_aggregate_as_it_is():
    optimizer = sgd()
    state = optimizer.init(2)
    assert state.size == 0
    step, state = optimizer.step(state, ONE)
    assert step.tolist() == [1.0, -2.0]
    assert state.size == 0


def test_learning_rate():
    optimizer = sgd(0.5)
    assert optimizer.step(optimizer.init(2), ONE)[0].tolist() == [0.5, -1.0]


def test_momentum_by_hand():
    optimizer = sgd(0.5, momentum=0.5)
    state = optimizer.init(2)
    steps = []
    for _ in range(3):
        before = state.copy()
        step, following = optimizer.step(state, ONE)
        assert state.tolist() == before.tolist(), "arguments are never written to"
        state = following
        steps.append(step.tolist())
    assert steps == [[0.5, -1.0], [0.75, -1.5], [0.875, -1.75]]
    assert all(array.dtype == np.float32 for array in (step, state))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_survives_the_ledger(momentum):
    optimizer = sgd(1.0, momentum)
    _, state = optimizer.step(optimizer.init(2), ONE)
    found = unpack(pack(state), optimizer.init(2))
    assert found.dtype == np.float32
    assert found.tolist() == state.tolist()


def test_golden_bytes():
    assert pack(ONE).hex() == "01" + "0000803f" + "000000c0"


def test_another_optimizer_s_state_is_refused():
    with pytest.raises(LedgerError, match=r"is 8 bytes; expected 0: was aggregation\.momentum changed"):
        unpack(pack(ONE), sgd().init(2))
    with pytest.raises(LedgerError, match="has format 02; expected 01"):
        unpack(b"\x02", sgd().init(2))
    with pytest.raises(LedgerError, match="has format none"):
        unpack(b"", sgd().init(2))
