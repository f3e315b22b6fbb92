"""Gradient rules, as a table: ATen backward operator -> ONNX.

Autograd applies the chain rule while a step is traced; what is left are the ``*_backward`` operators that PyTorch does
not decompose, or decomposes into more passes over memory than needed. Rules look like those of `operators`.
"""

import math
from collections.abc import Sequence

import numpy as np

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value
from export.operators import INVERSE_SQRT_TAU, operand


def _threshold(b: Lowering, out: Value, grad: Value, result: Value, threshold: float) -> str:
    # Mul(Cast(mask)) is five times faster than Where in onnxruntime.
    mask = b.op("Greater", result.name, b.scalar(threshold, result.dtype))
    return b.op("Mul", grad.name, b.cast(mask, "bool", out.dtype))


def _sigmoid(b: Lowering, out: Value, grad: Value, y: Value) -> str:
    slope = b.op("Mul", y.name, b.op("Sub", b.scalar(1, out.dtype), y.name))
    return b.op("Mul", grad.name, slope)


def _tanh(b: Lowering, out: Value, grad: Value, y: Value) -> str:
    return b.op("Mul", grad.name, b.op("Sub", b.scalar(1, out.dtype), b.op("Mul", y.name, y.name)))


def _gelu(b: Lowering, out: Value, grad: Value, x: Value, *, approximate: str = "none") -> str:
    if approximate != "none":
        raise ExportError(f"GELU with approximate={approximate!r} has no gradient rule; use the exact one")

    def number(value: float) -> str:
        return b.scalar(value, out.dtype)

    erf = b.op("Erf", b.op("Mul", x.name, number(math.sqrt(0.5))))
    cdf = b.op("Mul", b.op("Add", erf, number(1)), number(0.5))
    density = b.op("Exp", b.op("Mul", b.op("Mul", x.name, x.name), number(-0.5)))
    slope = b.op("Add", cdf, b.op("Mul", b.op("Mul", x.name, density), number(INVERSE_SQRT_TAU)))
    return b.op("Mul", grad.name, slope)


def _slice(
    b: Lowering, out: Value, grad: Value, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> str:
    if start == 0 and step == 1 and end > 2**60:
        return grad.name
    length = out.static(dim)[0]
    if step != 1:
        raise ExportError("slicing with a step has no gradient rule")
    first, last = (min(max(v + length if v < 0 else v, 0), length) for v in (start, end))
    return _padded(b, out, grad.name, dim, first, length - last)


def _select(b: Lowering, out: Value, grad: Value, sizes: Sequence[int], dim: int, index: int) -> str:
    length = out.static(dim)[0]
    place = index % length
    widened = b.op("Unsqueeze", grad.name, b.ints([dim % out.rank]))
    return _padded(b, out, widened, dim, place, length - place - 1)


def _padded(b: Lowering, out: Value, name: str, dim: int, before: int, after: int) -> str:
    pads = np.zeros((2, out.rank), np.int64)
    pads[:, dim] = before, after
    return b.op("Pad", name, b.ints(pads.ravel()), b.scalar(0, out.dtype)) if pads.any() else name


def _embedding(
    b: Lowering, out: Value, grad: Value, indices: Value, rows: int, padding: int = -1, by_frequency: bool = False
) -> str:
    if by_frequency:
        raise ExportError("scale_grad_by_freq is not supported")
    values = grad.name
    if padding >= 0:
        kept = b.op("Not", b.op("Equal", indices.name, b.scalar(padding, indices.dtype)))
        values = b.op("Mul", values, b.op("Unsqueeze", b.cast(kept, "bool", out.dtype), b.ints([-1])))
    places = b.op("Unsqueeze", indices.name, b.ints([-1]))
    return b.op("ScatterND", b.zeros(out.shape, out.dtype), places, values, reduction="add")


def _layer_norm(
    b: Lowering,
    out: Sequence[Value],
    grad: Value,
    x: Value,
    shape: Sequence[int],
    mean: Value,
    rstd: Value,
    weight: Value | None,
    bias: Value | None,
    mask: Sequence[bool],
) -> tuple[str | None, ...]:
    inner = list(range(x.rank - len(shape), x.rank))
    outer = list(range(x.rank - len(shape)))
    normal = b.op("Mul", b.op("Sub", x.name, mean.name), rstd.name)
    scaled = b.op("Mul", grad.name, weight.name) if weight is not None else grad.name
    centred = b.op("Sub", scaled, b.reduce("ReduceMean", scaled, inner, True))
    along = b.reduce("ReduceMean", b.op("Mul", scaled, normal), inner, True)
    grads = b.op("Mul", b.op("Sub", centred, b.op("Mul", normal, along)), rstd.name)
    return (
        grads if mask[0] else None,
        b.reduce("ReduceSum", b.op("Mul", grad.name, normal), outer) if mask[1] else None,
        b.reduce("ReduceSum", grad.name, outer) if mask[2] else None,
    )


def _softmax(b: Lowering, out: Value, grad: Value, y: Value, dim: int, *_: object) -> str:
    along = b.reduce("ReduceSum", b.op("Mul", grad.name, y.name), [dim], True)
    return b.op("Mul", y.name, b.op("Sub", grad.name, along))


def _log_softmax(b: Lowering, out: Value, grad: Value, y: Value, dim: int, *_: object) -> str:
    total = b.reduce("ReduceSum", grad.name, [dim], True)
    return b.op("Sub", grad.name, b.op("Mul", b.op("Exp", y.name), total))


def _leaky_relu(b: Lowering, out: Value, grad: Value, x: Value, slope: float, _: bool) -> str:
    positive = b.cast(b.op("Greater", x.name, b.scalar(0, x.dtype)), "bool", out.dtype)
    factor = b.op("Add", b.op("Mul", positive, b.scalar(1 - slope, out.dtype)), b.scalar(slope, out.dtype))
    return b.op("Mul", operand(b, grad, out.dtype), factor)


GRADIENTS: dict[str, Rule] = {
    "aten.threshold_backward": _threshold,
    "aten.leaky_relu_backward": _leaky_relu,
    "aten.sigmoid_backward": _sigmoid,
    "aten.tanh_backward": _tanh,
    "aten.gelu_backward": _gelu,
    "aten.slice_backward": _slice,
    "aten.select_backward": _select,
    "aten.embedding_dense_backward": _embedding,
    "aten.native_layer_norm_backward": _layer_norm,
    "aten._softmax_backward_data": _softmax,
    "aten._log_softmax_backward_data": _log_softmax,
}
"""Convolution and pooling have their own modules, `convolution` and `pooling`; recurrent layers theirs, `recurrent`."""
