import numpy as np
import pytest
import torch

from broker_server.aggregation.optimizer import adaptive, chain, pack, scale_by, trace, unpack
from edge_client.errors import LedgerError

ONE = np.float32([1, -2])
SEED = 2021
CHAINS = {
    "fedavg": chain(trace(0.0), scale_by(lambda _: 0.5)),
    "momentum": chain(trace(0.9), scale_by(lambda _: 0.5)),
    "adam": chain(adaptive("adam", 0.9, 0.99, 1e-3), scale_by(lambda _: 0.01)),
    "yogi": chain(adaptive("yogi", 0.9, 0.99, 1e-3), scale_by(lambda _: 0.01)),
    "adagrad": chain(adaptive("adagrad", 0.0, 0.0, 1e-3), scale_by(lambda _: 0.01)),
    "adagrad with momentum": chain(adaptive("adagrad", 0.9, 0.0, 1e-3), scale_by(lambda _: 0.01)),
}


def walk(optimizer, aggregates):
    state, steps = optimizer.init(aggregates[0].size), []
    for count, aggregate in enumerate(aggregates):
        kept = [vector.copy() for vector in (aggregate, *state)]
        step, following = optimizer.step(state, aggregate, count)
        for vector, before in zip((aggregate, *state), kept, strict=True):
            np.testing.assert_array_equal(vector, before, "arguments are never written to")
        state = following
        steps.append(step)
        assert all(vector.dtype == np.float32 for vector in (step, *state))
    return steps, state


def test_plain_fedavg_takes_the_aggregate_as_it_is():
    optimizer = chain(trace(0.0), scale_by(lambda _: 1.0))
    assert optimizer.init(2) == ()
    assert walk(optimizer, [ONE])[0][0].tolist() == [1.0, -2.0]


def test_momentum_by_hand():
    steps, _ = walk(chain(trace(0.5), scale_by(lambda _: 0.5)), [ONE] * 3)
    assert [step.tolist() for step in steps] == [[0.5, -1.0], [0.75, -1.5], [0.875, -1.75]]


def test_the_rate_is_that_of_the_step():
    steps, _ = walk(scale_by(lambda count: 2.0**-count), [ONE] * 3)
    assert [step[0] for step in steps] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        # From v = 1 with d = 3: m = 0.5 * 0 + 0.5 * 3 = 1.5.
        ("adam", 0.75 * 1 + 0.25 * 9),
        ("yogi", 1 - 0.25 * 9 * -1),
        ("adagrad", 1 + 9),
    ],
)
def test_adaptive_steps_by_hand(kind, second):
    steps, _ = walk(adaptive(kind, 0.5, 0.75, 1.0), [np.float32([3])])
    assert steps[0].item() == pytest.approx(1.5 / (second**0.5 + 1))


def test_yogi_forgets_a_large_aggregate_more_slowly_than_adam():
    aggregates = [np.float32([10])] + [np.float32([0.1])] * 20
    steps = {kind: walk(adaptive(kind, 0.0, 0.9, 1e-3), aggregates)[0][-1].item() for kind in ("adam", "yogi")}
    assert steps["yogi"] < 0.5 * steps["adam"]


def reference(kind, beta1, beta2, tau, rate, aggregates):
    """Algorithm 2 of Reddi et al. in float64, line by line."""
    model = torch.zeros(aggregates[0].size, dtype=torch.float64)
    first, second = torch.zeros_like(model), torch.full_like(model, tau**2)
    for aggregate in aggregates:
        change = torch.from_numpy(aggregate).double()
        first = beta1 * first + (1 - beta1) * change
        if kind == "adagrad":
            second = second + change**2
        elif kind == "yogi":
            second = second - (1 - beta2) * change**2 * torch.sign(second - change**2)
        else:
            second = torch.lerp(change**2, second, beta2)
        model += rate * first / (second.sqrt() + tau)
    return model.numpy()


@pytest.mark.parametrize(
    ("name", "kind", "beta1"),
    [
        ("adam", "adam", 0.9),
        ("yogi", "yogi", 0.9),
        ("adagrad", "adagrad", 0.0),
        ("adagrad with momentum", "adagrad", 0.9),
    ],
)
def test_adaptive_steps_are_the_papers(name, kind, beta1):
    rng = np.random.default_rng(SEED)
    aggregates = [rng.normal(0, 0.1, 50).astype(np.float32) for _ in range(30)]
    steps, _ = walk(CHAINS[name], aggregates)
    expected = reference(kind, beta1, 0.99, 1e-3, 0.01, aggregates)
    np.testing.assert_allclose(np.sum(steps, axis=0, dtype=np.float64), expected, rtol=1e-4, atol=1e-6)


def test_momentum_is_torch_s():
    rng = np.random.default_rng(SEED)
    aggregates = [rng.normal(size=20).astype(np.float32) for _ in range(10)]
    weight = torch.nn.Parameter(torch.zeros(20))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    for aggregate in aggregates:
        weight.grad = -torch.from_numpy(aggregate)
        optimizer.step()
    steps, _ = walk(CHAINS["momentum"], aggregates)
    np.testing.assert_allclose(np.sum(steps, axis=0), weight.detach().numpy(), rtol=1e-5)


RATES = {
    "momentum": lambda count: 1.0,
    "adam": lambda count: 10.0 / (1 + count / 20),
    "yogi": lambda count: 10.0 / (1 + count / 20),
    "adagrad": lambda count: 50.0,
    "adagrad with momentum": lambda count: 50.0,
}
"""What the learning rates above are multiplied with: adaptive steps get no shorter near the optimum by themselves."""


@pytest.mark.parametrize("name", RATES)
def test_each_finds_the_optimum_of_a_quadratic(name):
    curvature, optimum = np.float32([1, 4, 0.25]), np.float32([1, -2, 3])
    optimizer, model = chain(CHAINS[name], scale_by(RATES[name])), np.zeros(3, np.float32)
    state = optimizer.init(3)
    for count in range(1500):
        step, state = optimizer.step(state, 0.1 * curvature * (optimum - model), count)
        model = model + step
    np.testing.assert_allclose(model, optimum, atol=0.01)


@pytest.mark.parametrize("name", CHAINS)
def test_a_state_survives_the_ledger(name):
    optimizer = CHAINS[name]
    _, state = walk(optimizer, [ONE, 3 * ONE])
    found = unpack(pack(optimizer.name, state), optimizer.name, optimizer.init(2))
    assert [vector.tobytes() for vector in found] == [vector.tobytes() for vector in state]


def test_golden_bytes():
    assert pack("momentum", (ONE,)).hex() == "01" + "0000803f" + "000000c0"
    assert pack("adam", (ONE, ONE)).hex() == "0204" + b"adam".hex() + 2 * ("0000803f" + "000000c0")


def test_another_optimizer_s_state_is_refused():
    with pytest.raises(LedgerError, match=r"is 8 bytes of momentum; expected 0 of none: was \[server\] or .* changed"):
        unpack(pack("momentum", (ONE,)), "", ())
    with pytest.raises(LedgerError, match="is 16 bytes of adam; expected 16 of yogi"):
        unpack(pack("adam", (ONE, ONE)), "yogi", (ONE, ONE))
    with pytest.raises(LedgerError, match="is 0 bytes of none; expected 16 of yogi"):
        unpack(pack("", ()), "yogi", (ONE, ONE))
    with pytest.raises(LedgerError, match="is 8 bytes of adam; expected 16 of adam"):
        unpack(pack("adam", (ONE,)), "adam", (ONE, ONE))
    with pytest.raises(LedgerError, match="has format 09; expected 01"):
        unpack(b"\x09", "", ())
    with pytest.raises(LedgerError, match="has format none"):
        unpack(b"", "", ())
