"""What ONNX Runtime itself says of a run: the order of its nodes, and how much lived at once."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from export.memory import VIEWS

Feeds = Mapping[str, np.ndarray[Any, Any]]


def profiled(model: bytes, feeds: Feeds, folder: Path, *, optimized: bool) -> tuple[onnx.ModelProto, list[Any]]:
    """The graph that ran, and an event for each of its nodes, in order."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return onnx.load(folder / "optimized.onnx"), sorted(ran, key=lambda e: e["ts"])


def live_peak(model: bytes, feeds: Feeds, folder: Path) -> int:
    """The most bytes of values that lived at once in a real run, results left out."""
    graph, events = profiled(model, feeds, folder, optimized=True)
    nodes = {node.name: node for node in graph.graph.node}
    order = [(nodes[e["name"].removesuffix("_kernel_time")], e["args"]["output_type_shape"]) for e in events]
    root: dict[str, str] = {}
    last: dict[str, int] = {}
    for place, (node, _) in enumerate(order):
        if node.op_type in VIEWS:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
        last |= {root.get(name, name): place for name in node.input}
    results = {value.name for value in graph.graph.output}
    alive: dict[str, int] = {}
    peak = 0
    for place, (node, made) in enumerate(order):
        for name, described in zip((name for name in node.output if name), made, strict=True):
            ((kind, shape),) = described.items()
            if name not in root and name not in results:
                alive[name] = math.prod(shape) * _width(kind)
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > place}
    return peak


def _width(kind: str) -> int:
    names = {"float": "FLOAT", "double": "DOUBLE"}
    number = onnx.TensorProto.DataType.Value(names.get(kind, kind.upper()))
    return int(helper.tensor_dtype_to_np_dtype(number).itemsize)
