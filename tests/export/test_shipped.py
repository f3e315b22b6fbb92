"""Every ready model exports in time, as plain ONNX that the runtime can make the best of."""

import importlib
import inspect
import pkgutil
import time
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import export.models
from edge_client import runtime
from edge_client.bundle import Bundle
from export.bundle import export_bundle
from tests.export.loaded import graph_of

IMAGE, CODES, WINDOW = ((1, 28, 28), "float32"), ((64,), "int64"), ((9, 128), "float32")
INPUTS = {
    "logistic_regression": IMAGE,
    "mnist_2nn": IMAGE,
    "mnist_cnn": IMAGE,
    "digits_cnn": ((1, 8, 8), "float32"),
    "ds_cnn": ((1, 49, 10), "float32"),
    "resnet8": ((3, 32, 32), "float32"),
    "sensor_cnn": WINDOW,
    "sensor_lstm": WINDOW,
    "char_gru": CODES,
    "char_transformer": CODES,
    "gpt_lora": CODES,
    "recommender": ((1,), "int64"),
}
LOSSES = {"recommender": "mse"}
DATA = "ratings"
"""The one module among them that makes samples."""
SECONDS = 30
"""Of processor time, which a busy machine does not stretch."""

FACTORIES = {
    name: made
    for found in pkgutil.iter_modules(export.models.__path__)
    if found.name != DATA
    for name, made in inspect.getmembers(importlib.import_module(f"export.models.{found.name}"), inspect.isfunction)
    if made.__module__ == f"export.models.{found.name}" and not name.startswith("_")
}


def test_every_ready_model_is_a_case() -> None:
    assert INPUTS.keys() == FACTORIES.keys()


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    bodies = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for body in bodies for node in nodes(body))]


@pytest.mark.parametrize("name", INPUTS)
def test_a_ready_model_exports_in_time_as_plain_onnx(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, started = FACTORIES[name](), time.process_time()
    loss = LOSSES.get(name, "cross_entropy")
    report = export_bundle(module, tmp_path / "m.fedge", name=name, inputs=[INPUTS[name]], loss=loss)
    assert time.process_time() - started < SECONDS, f"{report.seconds:.1f} s by the clock"
    assert sum(report.manifest.layout(role).size for role in ("trainable", "frozen")) == sum(
        p.numel() for p in module.parameters()
    )
    bundle = Bundle.open(report.path)
    for kind, stored in (("train", bundle.train), ("eval", bundle.eval), ("infer", bundle.infer)):
        # Checked in full when it is loaded; weights are handed over in memory and never in a file.
        model = graph_of(report.path, kind)
        assert [opset.domain for opset in model.opset_import] == [""]
        assert {node.domain for node in nodes(model.graph)} == {""}
        external = [i for i in onnx.load_from_string(stored).graph.initializer if i.external_data]
        assert all([(e.key, e.value) for e in i.external_data] == [("location", "fedge")] for i in external)
    assert [path.name for path in tmp_path.iterdir()] == ["m.fedge"]


def test_normalisation_becomes_part_of_convolutions_in_inference(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    path = export_bundle(module, tmp_path / "m.fedge", name="m", inputs=[((2, 4, 4), "float32")]).path
    for kind in ("eval", "infer"):
        options = runtime.ort.SessionOptions()
        options.graph_optimization_level = runtime.ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        model = graph_of(path, kind)
        assert "BatchNormalization" in {node.op_type for node in model.graph.node}
        runtime.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
        assert "FusedConv" in kinds
        assert not {"BatchNormalization", "Relu", "Sqrt"}.intersection(kinds)
