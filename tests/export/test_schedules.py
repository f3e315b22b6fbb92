"""A learning rate that falls over a task, in each optimizer and with all that joins a gradient, held to torch.optim."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.course import Course
from edge_client.data import ArraySource
from edge_client.trainer import Trainer, _epoch_seed
from edge_client.wire.messages import TrainPlan
from export.bundle import export_bundle
from export.reference import make_optimizer
from export.updates import UPDATES

HYPERS = {"lr": 0.1, "momentum": 0.8, "beta1": 0.85, "beta2": 0.97, "eps": 1e-8}
EPOCHS, BATCH, SEED = 3, 8, 7
RNG = np.random.default_rng(1)
DATA = {"x": RNG.normal(size=(20, 5)).astype(np.float32), "y": np.arange(20) % 3}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, made = tmp_path_factory.mktemp("schedules"), {}

    def get(name: str, clip: float | None) -> Bundle:
        if (name, clip) not in made:
            path: Path = folder / f"{name}{clip}.fedge"
            inputs = [((5,), "float32")]
            export_bundle(network(), path, name=name, inputs=inputs, optimizer=name, clip=clip, proximal=True)
            made[name, clip] = Bundle.open(path)
        return made[name, clip]

    return get


def in_pytorch(name: str, schedule: Any, decay: float, mu: float, max_norm: float) -> dict[str, Tensor]:
    """The plain loop. With momentum, PyTorch would move all gradients so far at the rate of the present step; here each
    goes on at the rate of its own, so that its optimizer gets them times the rate and moves at a rate of one."""
    module, done = network(), 0
    leaves, linear = list(module.parameters()), name in ("momentum", "nesterov")
    anchors = [leaf.detach().clone() for leaf in leaves]
    own = {"lr": 1.0, "weight_decay": 0.0} if linear else {"weight_decay": decay}
    optimizer = make_optimizer(name, leaves, HYPERS | own)
    course = Course(EPOCHS * 3, schedule=schedule)
    for epoch in range(EPOCHS):
        for batch in ArraySource(DATA).batches(BATCH, seed=_epoch_seed(SEED, epoch)):
            optimizer.zero_grad()
            x, y = torch.tensor(batch["x"]), torch.tensor(batch["y"])
            nn.functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
            for leaf, anchor in zip(leaves, anchors, strict=True):
                assert leaf.grad is not None
                leaf.grad += mu * (leaf.detach() - anchor)
            if max_norm:
                nn.utils.clip_grad_norm_(leaves, max_norm)
            rate = HYPERS["lr"] * course.factor(done)
            if linear:
                for leaf in leaves:
                    assert leaf.grad is not None
                    leaf.grad = rate * (leaf.grad + decay * leaf.detach())
            else:
                optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            done += 1
    return {key: leaf.detach() for key, leaf in module.named_parameters()}


CASES = [(name, decay, mu, None) for name in UPDATES for decay, mu in ((0.0, 0.0), (0.1, 0.3))]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "decay", "mu", "max_norm"), [*CASES, ("nesterov", 0.1, 0.3, 0.2)])
def test_a_falling_rate_trains_as_in_pytorch(
    exported: Any, name: str, schedule: Any, decay: float, mu: float, max_norm: float | None
) -> None:
    bundle = exported(name, max_norm)
    known = HYPERS | {"weight_decay": decay, "mu": mu, "max_norm": max_norm}
    hypers = {hyper: known[hyper] for hyper in bundle.manifest.defaults()}
    plan = TrainPlan(epochs=EPOCHS, batch_size=BATCH, hypers=hypers, schedule=schedule)
    result = Trainer(bundle).train(bundle.initial(), ArraySource(DATA), plan, seed=SEED)
    wanted = in_pytorch(name, schedule, decay, mu, max_norm or 0.0)
    begin, found = bundle.layout.views(bundle.initial()), bundle.layout.views(result.local)
    for key, want in wanted.items():
        moved = np.abs(want.numpy() - begin[key]).max()
        np.testing.assert_allclose(found[key], want.numpy(), rtol=0, atol=1e-4 * moved)
    constant = TrainPlan(epochs=EPOCHS, batch_size=BATCH, hypers=hypers)
    other = Trainer(bundle).train(bundle.initial(), ArraySource(DATA), constant, seed=SEED)
    assert np.abs(other.local - result.local).max() > 1e-2 * np.abs(result.local - bundle.initial()).max()
