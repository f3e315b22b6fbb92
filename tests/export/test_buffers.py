"""Buffers that the forward pass changes: running statistics, counters, assignments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.errors import ExportError
from edge_client.manifest import Feature
from edge_client.trainer import Trainer, _epoch_seed
from edge_client.wire.messages import TrainPlan
from export.bundle import RULES, export_bundle
from export.lower import Lowering
from export.partial import changing_buffers
from tests.export.loaded import graph_of

IMAGES = [((2, 6, 6), "float32")]


def batch_norm_cnn() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class Statistics(nn.Module):
    """Every way to change a buffer, and one buffer that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        for name, value in (("mean", torch.zeros(5)), ("last", torch.zeros(5)), ("scale", torch.full((5,), 2.0))):
            self.register_buffer(name, value)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("used", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.last.copy_(x.detach().sum(0))
            self.seen = self.seen + x.shape[0]
            self.used.fill_(True)
        result: Tensor = self.layer((x - self.mean) * self.scale)
        return result


def test_buffers_that_change_are_outputs_and_others_are_frozen(tmp_path: Path) -> None:
    report = export_bundle(Statistics(), tmp_path / "s.fedge", name="s", inputs=[((5,), "float32")])
    roles = {p.name: (p.role, p.dtype) for p in report.manifest.parameters if p.role != "trainable"}
    assert roles == {
        "mean": ("buffer", "float32"), "last": ("buffer", "float32"), "seen": ("buffer", "int64"),
        "used": ("buffer", "bool"), "scale": ("frozen", "float32"),
    }  # fmt: skip
    outputs = {o.name for o in graph_of(report.path, "train").graph.output}
    assert {"next.mean", "next.last", "next.seen"} <= outputs
    assert "next.scale" not in outputs


def test_changes_are_found_without_leaving_any() -> None:
    module = batch_norm_cnn().eval()
    before = {n: b.clone() for n, b in module.named_buffers()}
    state = torch.get_rng_state()
    found = changing_buffers(module, [Feature("x", (2, 6, 6), "float32")])
    assert found == set(before)
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    assert not module.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_batch_norm_network_trains_and_evaluates_as_in_pytorch(optimizer: str, tmp_path: Path) -> None:
    path = tmp_path / "b.fedge"
    export_bundle(batch_norm_cnn(), path, name="b", inputs=IMAGES, optimizer=optimizer, lr=0.01, eps=1e-3)
    bundle = Bundle.open(path)
    generator = np.random.default_rng(3)
    data: dict[str, Any] = {
        "x": generator.normal(1, 2, (50, 2, 6, 6)).astype(np.float32),
        "y": generator.integers(0, 3, 50),
    }
    trainer = Trainer(bundle)
    result = trainer.train(bundle.initial(), ArraySource(data), TrainPlan(epochs=2, batch_size=10), seed=4)

    module = batch_norm_cnn()
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    moving = make(module.parameters(), lr=0.01, **({"eps": 1e-3} if optimizer == "adam" else {}))
    for epoch in range(2):
        for batch in ArraySource(data).batches(10, seed=_epoch_seed(4, epoch)):
            moving.zero_grad()
            loss = nn.functional.cross_entropy(module(torch.tensor(batch["x"])), torch.tensor(batch["y"]))
            loss.backward()  # type: ignore[no-untyped-call]
            moving.step()
    state = module.state_dict()
    for name, view in bundle.layout.views(result.local).items():
        np.testing.assert_allclose(view, state[name].numpy(), rtol=2e-4, atol=2e-5)
    for name, view in bundle.manifest.layout("buffer").views(result.buffers).items():
        np.testing.assert_allclose(view, state[name].numpy(), rtol=1e-4, atol=1e-6)
    assert state["1.num_batches_tracked"] == 10

    sums = trainer.evaluate(result.local, ArraySource(data), buffers=result.buffers)
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(
            module.eval()(torch.tensor(data["x"])), torch.tensor(data["y"]), reduction="sum"
        )
    assert sums["loss"] == pytest.approx(wanted.item(), rel=1e-3)
    assert trainer.evaluate(result.local, ArraySource(data))["loss"] != pytest.approx(wanted.item(), rel=1e-3)


def test_normalisation_of_another_shape_of_a_value(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.BatchNorm1d(9), nn.Linear(9, 2))
    report = export_bundle(module, tmp_path / "v.fedge", name="v", inputs=[((2, 4), "float32")])
    assert "next.2.running_mean" in {o.name for o in graph_of(report.path, "train").graph.output}


def test_a_running_mean_changes_though_its_input_is_zero() -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.BatchNorm1d(3))
    for parameter in module[0].parameters():
        nn.init.zeros_(parameter)
    assert "2.running_mean" in changing_buffers(module, [Feature("x", (2, 4), "float32")])


class Assigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.bias.data.mul_(0.5)
        result: Tensor = self.layer(x)
        return result


def test_a_forward_that_changes_a_parameter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="changes a parameter or an input in its forward"):
        export_bundle(Assigned(), tmp_path / "a.fedge", name="a", inputs=[((5,), "float32")])


@pytest.mark.parametrize("part", [0, 1])
def test_a_wrong_gradient_of_normalisation_is_caught_though_uniform_inputs_say_nothing(
    part: int, tmp_path: Path
) -> None:
    def wrong(b: Lowering, out: Any, *args: Any) -> Any:
        found = list(RULES["aten.native_batch_norm_backward"](b, out, *args))  # type: ignore[arg-type]
        if found[part] is not None:
            found[part] = b.op("Mul", found[part], b.scalar(1.01, "float32"))
        return tuple(found)

    rules = {**RULES, "aten.native_batch_norm_backward": wrong}
    with pytest.raises(ExportError, match="disagrees with PyTorch"):
        export_bundle(batch_norm_cnn(), tmp_path / "w.fedge", name="w", inputs=IMAGES, rules=rules)
