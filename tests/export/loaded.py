"""Graphs of a bundle as tests look at them: whole, and as sessions with the bundle's own weights."""

from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from edge_client import runtime
from edge_client.bundle import EVAL, INFER, TRAIN, Bundle
from edge_client.graphs import aligned


def graph_of(path: Path, kind: str) -> onnx.ModelProto:
    """A graph with the bundle's weights inside, checked in full."""
    bundle = Bundle.open(path)
    model = onnx.load_from_string(_bytes(bundle, kind))
    for constant in model.graph.initializer:
        if constant.data_location == onnx.TensorProto.EXTERNAL:
            value = bundle.weights[constant.name.removeprefix("param.")]
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))
    onnx.checker.check_model(model, full_check=True)
    return model


def session_of(path: Path, kind: str) -> Any:
    """A session of a graph with the bundle's weights."""
    bundle = Bundle.open(path)
    constants = {f"param.{n}": aligned(bundle.weights[n]) for n in bundle.manifest.constants[f"{kind}.onnx"]}
    return runtime.session(_bytes(bundle, kind), constants=constants)


def _bytes(bundle: Bundle, kind: str) -> bytes:
    return {TRAIN: bundle.train, EVAL: bundle.eval, INFER: bundle.infer}[f"{kind}.onnx"]
