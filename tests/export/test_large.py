"""The forms of large weights: with and without decay, against plain arithmetic."""

import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_client import runtime
from export.bundle import export_bundle

ROWS, COLUMNS = 256, 600


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_large_layers_decay_as_in_pytorch(decay: float, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=bias), nn.ReLU(), nn.Linear(ROWS, 3))
    report = export_bundle(module, tmp_path / "l.fedge", name="l", inputs=[((COLUMNS,), "float32")])
    with zipfile.ZipFile(report.path) as archive:
        model = archive.read("train.onnx")
    ops = [node.op_type for node in onnx.load_from_string(model).graph.node]
    assert ops.count("If") == 1  # the small layer has none
    x, y = torch.randn(5, COLUMNS), torch.tensor([0, 1, 2, 0, 1])
    values = {f"param.{n}": p.detach().numpy().copy() for n, p in module.named_parameters()}
    values |= {"x": x.numpy(), "y": y.numpy()}
    values |= {"hyper.lr": np.array(0.5, np.float32), "hyper.weight_decay": np.array(decay, np.float32)}
    session = runtime.session(model)
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(None, values), strict=True))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=decay)
    nn.functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(results[f"next.{name}"], parameter.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_evaluation_keeps_the_plain_form(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.ReLU(), nn.Linear(ROWS, 3))
    report = export_bundle(module, tmp_path / "e.fedge", name="e", inputs=[((COLUMNS,), "float32")])
    with zipfile.ZipFile(report.path) as archive:
        graph = onnx.load_from_string(archive.read("eval.onnx")).graph
    assert not {"If", "Transpose"} & {node.op_type for node in graph.node}
