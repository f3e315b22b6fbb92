"""8-bit versions of exported models of every kind: convolutions, embeddings and attention, loops."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from broker_server.artifacts import Report, write_artifacts
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from export.bundle import export_bundle
from export.models.shakespeare import CharacterModel
from export.models.transformer import CharacterTransformer

ROWS = 96


class Residuals(nn.Module):
    """Normalised convolutions, one of them depthwise, a sum, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.head((self.second(x) + x).mean((2, 3)))
        return result


class Convolutions(nn.Module):
    """Nothing but convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x).mean((2, 3))
        return result


def deployed(module: nn.Module, shape: tuple[int, ...], folder: Path, **options: object) -> Report:
    """The models of a module with random weights, and running statistics that are not those of the start."""
    rng = np.random.default_rng(3)
    for name, buffer in module.named_buffers():
        if buffer.dtype == torch.float32 and "running" in name:
            buffer.copy_(torch.from_numpy(rng.uniform(0.5, 2, tuple(buffer.shape))))
    codes = options.pop("codes", False)
    x = rng.integers(0, 30, (ROWS, *shape)) if codes else rng.standard_normal((ROWS, *shape), np.float32)
    with torch.no_grad():
        y = module.eval()(torch.from_numpy(x)).argmax(-1).numpy()
    path = folder / "model.fedge"
    export_bundle(module, path, name="m", inputs=[(shape, "int64" if codes else "float32")])
    bundle = Bundle.open(path)
    return write_artifacts(
        folder / "out", bundle, bundle.initial(), data=ArraySource({"x": x, "y": y}), buffers=bundle.initial_buffers()
    )


@pytest.mark.parametrize(
    ("name", "dynamic", "static"), [("convolutions", 0.1, 1.0), ("attention", 0.95, 0.95), ("loop", 0.99, 0.99)]
)
def test_every_kind_of_model_in_8_bits(name: str, dynamic: float, static: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if name == "convolutions":
        report = deployed(Residuals(), (3, 8, 8), tmp_path)
    elif name == "attention":
        model = CharacterTransformer(layers=1, width=32, heads=2, vocabulary=30, length=12)
        report = deployed(model, (12,), tmp_path, codes=True)
    else:
        report = deployed(CharacterModel(30, 16, 32), (12,), tmp_path, codes=True)
    floats, *eight = report.models
    assert [model.problem for model in report.models] == ["", "", ""]
    assert floats.metrics == {"accuracy": 1.0}
    if name == "loop":
        # The read-out is one product of all rows, which can be in 8 bits, and not one for each example.
        assert "Expand" not in {node.op_type for node in onnx.load(tmp_path / "out" / "infer.onnx").graph.node}
    for model, share in zip(eight, (dynamic, static), strict=True):
        assert model.eight_bit >= share
        assert model.metrics["accuracy"] > 0.93
        assert 0 < model.metrics["difference"] < 0.05
        assert bool(model.worse) == (model.metrics["accuracy"] < 0.99)
        graph = onnx.load(tmp_path / "out" / model.file).graph
        assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
        assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_convolutions_alone_have_no_dynamic_model_and_the_report_says_why(tmp_path: Path) -> None:
    report = deployed(Convolutions(), (3, 8, 8), tmp_path)
    assert "convolutions stay in floats" in report.models[1].problem
    assert report.models[2].eight_bit == 1.0
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"infer.onnx", "infer.int8-static.onnx"}
