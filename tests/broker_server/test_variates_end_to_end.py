"""SCAFFOLD and FedDyn in a whole federation, beside the papers' algorithms written in PyTorch."""

import numpy as np
import pytest
import torch

from tests.broker_server.cast import Cast
from tests.toy import toy_bundle, toy_data

BUNDLE = toy_bundle(control=True, proximal=True)
NAMES = ("a", "b", "c", "d", "e")
EVERYONE = [NAMES] * 3
PARTLY = [("a", "b", "c"), ("b", "d"), ("e", "a"), ("a", "b", "c"), ("d",), ("c", "e", "a")]


def uneven() -> dict[str, dict[str, np.ndarray]]:
    """Each client has mostly one class, and another number of samples."""
    found = {}
    for number, name in enumerate(NAMES):
        data = toy_data(200, seed=number)
        take = np.flatnonzero((data["y"] == number % 3) | (np.arange(200) < 10))[: 12 + 5 * number]
        found[name] = {key: value[take] for key, value in data.items()}
    return found


DATA = uneven()


def gradient(vector: torch.Tensor, name: str) -> torch.Tensor:
    vector = vector.clone().requires_grad_()
    weight, bias = vector[:12].reshape(3, 4), vector[12:]
    x, y = torch.tensor(DATA[name]["x"], dtype=torch.float64), torch.tensor(DATA[name]["y"])
    torch.nn.functional.cross_entropy(x @ weight.T + bias, y).backward()
    return vector.grad


def scaffold(start, rounds, *, steps, lr, server_lr):
    """Karimireddy et al. 2020, algorithm 1, option II."""
    x, c = start.clone(), torch.zeros_like(start)
    own = {name: torch.zeros_like(start) for name in NAMES}
    for chosen in rounds:
        moved, changed = [], []
        for name in chosen:
            y = x.clone()
            for _ in range(steps):
                y = y - lr * (gradient(y, name) - own[name] + c)
            after = own[name] - c + (x - y) / (steps * lr)
            moved.append(y - x)
            changed.append(after - own[name])
            own[name] = after
        x = x + server_lr * torch.stack(moved).mean(0)
        c = c + len(chosen) / len(NAMES) * torch.stack(changed).mean(0)
    return x


def feddyn(start, rounds, *, steps, lr, alpha):
    """Acar et al. 2021, algorithm 1; each problem is solved by so many steps of gradient descent."""
    theta, h = start.clone(), torch.zeros_like(start)
    own = {name: torch.zeros_like(start) for name in NAMES}
    for chosen in rounds:
        found = []
        for name in chosen:
            y = theta.clone()
            for _ in range(steps):
                y = y - lr * (gradient(y, name) - own[name] + alpha * (y - theta))
            own[name] = own[name] - alpha * (y - theta)
            found.append(y)
        h = h - alpha / len(NAMES) * sum(y - theta for y in found)
        theta = torch.stack(found).mean(0) - h / alpha
    return theta


def cast(folder, algorithm, *, kind="none", bundle=BUNDLE, options=None, **sections):
    more = {"alpha": 0.3} if algorithm == "feddyn" else {}
    return Cast(
        folder,
        bundle,
        DATA,
        aggregation={"algorithm": algorithm, "weights": "uniform", "options": {"clients": 5} | more},
        train={"steps": 4, "batch_size": 100, "hypers": {"lr": 0.5} if algorithm == "feddyn" else {"lr": 0.5, "mu": 0}},
        codec={"kind": kind},
        **sections,
    )


@pytest.mark.parametrize("rounds", [EVERYONE, PARTLY], ids=["everyone", "partly"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_federation_is_the_paper_s_algorithm(tmp_path, algorithm, rounds):
    server = {"learning_rate": 0.8} if algorithm == "scaffold" else {}
    played = cast(tmp_path, algorithm, server=server)
    start = torch.tensor(played.parameters, dtype=torch.float64)
    for names in rounds:
        played.round(names)
    if algorithm == "scaffold":
        expected = scaffold(start, rounds, steps=4, lr=0.5, server_lr=0.8)
    else:
        expected = feddyn(start, rounds, steps=4, lr=0.5, alpha=0.3)
    assert (expected - start).abs().max() > 0.1
    np.testing.assert_allclose(played.parameters, expected.numpy(), atol=2e-6)
