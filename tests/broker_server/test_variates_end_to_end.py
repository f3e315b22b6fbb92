"""SCAFFOLD and FedDyn in a whole federation, beside the papers' algorithms written in PyTorch."""

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from broker_server import events as e
from broker_server.training import train_plan
from edge_client.codec.update import decode_update
from edge_client.feedback import add_residual
from edge_client.learning import variates
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


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_with_the_codec_it_comes_near(tmp_path, algorithm):
    exact, coded = cast(tmp_path / "exact", algorithm), cast(tmp_path / "coded", algorithm, kind="quantized")
    start = exact.parameters
    for names in PARTLY:
        exact.round(names)
        coded.round(names)
    moved, apart = np.linalg.norm(exact.parameters - start), np.linalg.norm(exact.parameters - coded.parameters)
    assert apart < 0.35 * moved


@pytest.mark.parametrize("kind", ["none", "quantized"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_the_server_has_the_sum_of_what_devices_remember(tmp_path, algorithm, kind):
    """But for what quantization has left over on each of them; c of SCAFFOLD is the mean over all five."""
    played = cast(tmp_path, algorithm, kind=kind)
    for names in PARTLY:
        played.round(names)
    known = sum(remembers(played, name, algorithm) for name in NAMES)
    left = sum(residual(played, name) for name in NAMES)
    (kept,) = played.server._publication._head.variates
    expected = known + left / (4 * 0.5) if algorithm == "scaffold" else -known / 0.3 - left
    # A residual rests in a byte a parameter.
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=5e-3 if kind == "quantized" else 1e-5)
    assert np.abs(kept).max() > 0.1
    assert np.abs(left).max() > 0.02 or kind == "none"


def remembers(played, name, algorithm):
    layout = played.bundle.layout
    found = variates.remembered(played.clients[name].store.recall(algorithm), layout, played.restored.run)
    assert found is not None
    return found


def residual(played, name):
    found = np.zeros(played.bundle.layout.size, np.float32)
    if (data := played.clients[name].store.residual()) is not None:
        add_residual(found, data, played.bundle.layout, 2**30)
    return found


@pytest.mark.parametrize("kind", ["none", "quantized"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_restarts_of_server_and_clients_change_no_bit(tmp_path, algorithm, kind):
    server = {"optimizer": "sgd", "options": {"momentum": 0.5}}
    whole, torn = (cast(tmp_path / name, algorithm, kind=kind, server=server) for name in ("whole", "torn"))
    torn.restored = whole.restored  # the number of the run is the second in which it began
    for names in PARTLY[:3]:
        digest = whole.round(names)
        torn.open(names)
        for name in names:
            # Power fails once an update is stored, before its receipt came: it is sent again as it was.
            done = torn.train(name)
            torn.restart_client(name)
            assert torn.clients[name].store.held().pending.update == done.update
            torn.server.perform(e.Record(1, torn.task, name, done.update))
            torn.clients[name].store.settle(1, torn.task, recorded=True)
            torn.restart_server()
            torn.restored = whole.restored
        assert torn.close() == digest


def test_a_task_of_another_learning_rate_is_void_after_a_restart(tmp_path):
    played = cast(tmp_path, "scaffold")
    played.open(("a", "b"))
    played.record("a")
    faster = msgspec.structs.replace(played.settings.train, hypers={"lr": 50.0})
    played.settings = msgspec.structs.replace(played.settings, train=faster)
    played.restart_server()
    assert played.restored.open_tasks == ()


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_an_update_that_does_not_count_leaves_no_memory(tmp_path, algorithm):
    played = cast(tmp_path, algorithm)
    played.round(("a", "b"))
    store, before = played.clients["a"].store, remembers(played, "a", algorithm)
    for recorded in ([False], [True, False]):  # late; recorded, and void later
        played.open(("a",))
        played.train("a")
        for word in recorded:
            store.settle(1, played.task, recorded=word)
        np.testing.assert_array_equal(remembers(played, "a", algorithm), before)
        played.server.perform(e.CloseTask(1, played.task, "void"))
    # Those who never took part have none, and a server that voided their tasks has none of them.
    assert played.clients["c"].store.recall(algorithm) is None
    played.round(("a", "c"))
    assert not np.array_equal(remembers(played, "a", algorithm), before)


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_an_update_that_is_not_finite_is_refused_and_forgets_nothing(tmp_path, algorithm):
    played = cast(tmp_path, algorithm)
    played.round(("a", "b"))
    before = remembers(played, "a", algorithm)
    played.open(("a",))
    plan = train_plan(played.settings, played.task, played.restored.run)
    wild = msgspec.structs.replace(plan, hypers=plan.hypers | {"lr": 1e30, "weight_decay": 1e30})
    answer = played.server.perform(e.Record(1, played.task, "a", played.train("a", plan=wild).update))
    assert isinstance(answer, e.Refused)
    played.clients["a"].store.settle(1, played.task, recorded=False)
    np.testing.assert_array_equal(remembers(played, "a", algorithm), before)


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
@pytest.mark.parametrize("damage", ["cut", "another run"])
def test_a_memory_that_is_damaged_or_of_another_run_is_none(tmp_path, algorithm, damage):
    sent = []
    for spoilt in (False, True):
        played = cast(tmp_path / str(spoilt), algorithm)
        played.round(("a", "b"))
        if spoilt and damage == "cut":
            (file,) = (tmp_path / "True" / "a").glob("memory-*")
            file.write_bytes(file.read_bytes()[:-3])
        elif spoilt:
            played.restored = dataclasses.replace(played.restored, run=played.restored.run + 1)
        else:
            for file in (tmp_path / "False" / "a").glob("memory-*"):
                file.unlink()
        played.open(("a",))
        sent.append(decode_update(played.train("a").update, {"delta": played.bundle.layout}).vectors["delta"])
    np.testing.assert_array_equal(*sent)


def test_momentum_and_a_pull_are_taken_out_of_scaffold_s_estimate(tmp_path):
    """One client alone, whose gradient is that of its first step where the learning rate is tiny."""

    def named(members):
        manifest = msgspec.json.decode(members["manifest.json"])
        manifest["optimizer"]["name"] = "momentum"
        members["manifest.json"] = msgspec.json.encode(manifest)

    bundle = toy_bundle(control=True, proximal=True, momentum=True, alter=named)
    played = cast(tmp_path, "scaffold", bundle=bundle)
    tiny = {"lr": 1e-4, "momentum": 0.9, "mu": 50.0}
    played.settings = msgspec.structs.replace(
        played.settings, train=msgspec.structs.replace(played.settings.train, hypers=tiny, steps=20)
    )
    played.restart_server()
    start = torch.tensor(played.parameters, dtype=torch.float64)
    played.round(("a",))
    np.testing.assert_allclose(remembers(played, "a", "scaffold"), gradient(start, "a"), atol=5e-3)
