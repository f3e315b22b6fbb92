"""A trained graph in 8-bit integers, in standard operators that any stock ONNX Runtime runs."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

# First, because it switches the runtime's telemetry off before anything else can import the runtime.
from edge_client import runtime

Inputs = Callable[[], Iterator[Mapping[str, npt.NDArray[np.generic]]]]
"""Gives the calibration batches anew each time."""

_WEIGHTY = ["Conv", "Gemm", "MatMul"]


class _Reader:
    """Calibration batches as onnxruntime asks for them."""

    def __init__(self, inputs: Inputs) -> None:
        self._batches = inputs()

    def get_next(self) -> Mapping[str, npt.NDArray[np.generic]] | None:
        return next(self._batches, None)


def quantize(model: onnx.ModelProto, path: Path, inputs: Inputs | None) -> str:
    """Write ``model`` (weights inside) to ``path`` with 8-bit weights; returns "", or why that was not possible.

    With calibration ``inputs`` activations are 8-bit too, in ranges fixed from them (QuantizeLinear and
    DequantizeLinear around each operator). Without, ranges are found at each run (DynamicQuantizeLinear), and
    convolutions stay in floats: ConvInteger took 3 times as long on x86-64. Weights have a scale for each channel.
    A failure is a result and no exception: it must not cost the trained model.
    """
    # Imported here: `runtime` must have been imported before anything of onnxruntime.
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    assert runtime.VERSION
    try:
        with tempfile.TemporaryDirectory(prefix="fedge-") as folder:
            plain, prepared = Path(folder) / "plain.onnx", Path(folder) / "prepared.onnx"
            # From a path: given the model itself, it moves the weights into files that its own checks then refuse.
            onnx.save(model, plain)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            if inputs is None:
                quantization.quantize_dynamic(prepared, path, op_types_to_quantize=["Gemm", "MatMul"], per_channel=True)
            else:
                quantization.quantize_static(
                    prepared, path, _Reader(inputs), op_types_to_quantize=_WEIGHTY, per_channel=True
                )
    except Exception as error:
        path.unlink(missing_ok=True)
        return f"onnxruntime {runtime.VERSION} cannot quantize it: {' '.join(str(error).split())[:300]}"
    return ""
