"""A trained graph in 8-bit integers, in standard operators that any stock ONNX Runtime runs."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

# First, because it switches the runtime's telemetry off before anything else can import the runtime.
from edge_client import runtime

Inputs = Callable[[], Iterator[Mapping[str, npt.NDArray[np.generic]]]]
"""Gives the calibration batches anew each time."""

_PRODUCTS = ["Gemm", "MatMul"]
_BESIDE_CONVOLUTIONS = ["Add", "AveragePool", "Concat", "GlobalAveragePool", "MaxPool", "Relu", "Reshape", "Transpose"]
_LEAST_WEIGHTS = 512
"""Matrices of fewer values stay as they are: in 8 bits they would save less than the operator costs."""


class _Reader:
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, inputs: Inputs) -> None:
        self._batches = inputs()

    def get_next(self) -> Mapping[str, npt.NDArray[np.generic]] | None:
        return next(self._batches, None)


def quantize(model: onnx.ModelProto, path: Path, inputs: Inputs | None) -> str:
    """Write ``model`` (weights inside) to ``path`` with 8-bit weights; returns "", or why that was not possible.

    Static, with calibration ``inputs``: activations are 8-bit too, in ranges fixed from them (QuantizeLinear and
    DequantizeLinear around each operator). Dynamic, without: matrix products find the ranges of their activations at
    each run (DynamicQuantizeLinear, MatMulInteger), and convolutions stay in floats, since ConvInteger took 3 times as
    long as they do on x86-64, and 8-bit weights made floats at each run 2 to 4 times. Embeddings, and matrices that no
    8-bit product takes, such as those in the loop of a recurrent layer, are stored in 8 bits and multiply as floats.
    Weights of products and convolutions have a scale for each channel.

    A failure is a result and no exception: it must not cost the trained model.
    """
    # Imported here: `runtime` must have been imported before anything of onnxruntime.
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    assert runtime.VERSION
    try:
        with tempfile.TemporaryDirectory(prefix="fedge-") as folder:
            plain, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "made"))
            # From a path: given the model itself, it moves the weights into files that its own checks then refuse.
            onnx.save(model, plain)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            if inputs is None:
                quantization.quantize_dynamic(
                    prepared, made, op_types_to_quantize=[*_PRODUCTS, "Gather"], per_channel=True
                )
            else:
                quantization.quantize_static(
                    prepared,
                    made,
                    _Reader(inputs),
                    op_types_to_quantize=_static_operators(onnx.load(prepared).graph),
                    per_channel=True,
                    # Convolutions of signed activations took 3 times as long on x86-64.
                    activation_type=quantization.QuantType.QUInt8,
                )
            result = onnx.load(made)
            store_matrices(result.graph)
            if not eight_bit_share(result.graph):
                return "it has no weights that would be 8-bit" + ("" if inputs else ": convolutions stay in floats")
            onnx.checker.check_model(result)
            path.write_bytes(result.SerializeToString())
            runtime.session(path.read_bytes())
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"onnxruntime {runtime.VERSION} cannot quantize it: {' '.join(str(error).split())[:300]}"
    return ""


def eight_bit_share(graph: onnx.GraphProto) -> float:
    """The share of the weights' values (constants of two dimensions or more) that are stored in 8 bits."""
    sizes = {True: 0, False: 0}
    for constant in graph.initializer:
        if len(constant.dims) > 1 and constant.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8):
            sizes[constant.data_type == onnx.TensorProto.INT8] += int(np.prod(constant.dims))
    return sizes[True] / (sum(sizes.values()) or 1)


def store_matrices(graph: onnx.GraphProto) -> None:
    """Store float matrices that products read in 8 bits, with a scale for each row or column of the result.

    They become floats again once in a run, outside of loops that read them at each step.
    """
    readers = _readers(graph)
    dequantized = []
    for constant in list(graph.initializer):
        found = readers.get(constant.name, [])
        if (
            constant.data_type != onnx.TensorProto.FLOAT
            or len(constant.dims) != 2
            or np.prod(constant.dims) < _LEAST_WEIGHTS
            or not found
            or any(node.op_type not in _PRODUCTS or place > 1 for node, place in found)
        ):
            continue
        value, axis = numpy_helper.to_array(constant), _channels(*found[0])
        scale = np.maximum(np.abs(value).max(1 - axis, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
        eight, scales = f"{constant.name}.int8", f"{constant.name}.scale"
        graph.initializer.remove(constant)
        graph.initializer.append(numpy_helper.from_array(np.rint(value / scale).astype(np.int8), eight))
        graph.initializer.append(numpy_helper.from_array(scale.ravel(), scales))
        dequantized.append(helper.make_node("DequantizeLinear", [eight, scales], [constant.name], axis=axis))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*dequantized, *nodes])


def _static_operators(graph: onnx.GraphProto) -> list[str]:
    """Between convolutions activations stay in 8 bits: by a third faster. Sums of a transformer need more than 8."""
    kinds = {node.op_type for node in graph.node}
    between = _BESIDE_CONVOLUTIONS if "Conv" in kinds and "LayerNormalization" not in kinds else []
    return ["Conv", *_PRODUCTS, "Gather", *between]


def _readers(graph: onnx.GraphProto) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
    """Who reads each value, and as which input, bodies of loops included."""
    found: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            found.setdefault(name, []).append((node, place))
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                for name, readers in _readers(attribute.g).items():
                    found.setdefault(name, []).extend(readers)
    return found


def _channels(node: onnx.NodeProto, place: int) -> int:
    """The axis of a product's matrix that is an axis of its result too."""
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    return place ^ int(bool(flags.get("transA" if place == 0 else "transB", 0)))
