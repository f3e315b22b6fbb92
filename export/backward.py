"""Gradient rules, as a table: ATen backward operator -> ONNX.

Autograd applies the chain rule while a step is traced; what is left are the ``*_backward`` operators that PyTorch does
not decompose, or decomposes into more passes over memory than needed. Rules look like those of `operators`.
"""

from collections.abc import Sequence

import numpy as np

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value


def _slice(
    b: Lowering, out: Value, grad: Value, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> str:
    if step == 1 and start == 0 and end >= 2**62:
        return grad.name  # all of it, as in x[:, 0]; its length may be the batch
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


GRADIENTS: dict[str, Rule] = {
    "aten.slice_backward": _slice,
    "aten.select_backward": _select,
    "aten.embedding_dense_backward": _embedding,
}
"""Convolution and pooling have their own modules, `convolution` and `pooling`; recurrent layers theirs, `recurrent`."""
