"""Gradient rules, as a table: ATen backward operator -> ONNX.

Autograd applies the chain rule while a step is traced; what is left are the ``*_backward`` operators that PyTorch does
not decompose, or decomposes into more passes over memory than needed. Rules look like those of `operators`.
"""

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value


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


def _log_softmax(b: Lowering, out: Value, grad: Value, y: Value, dim: int, *_: object) -> str:
    total = b.reduce("ReduceSum", grad.name, [dim], True)
    return b.op("Sub", grad.name, b.op("Mul", b.op("Exp", y.name), total))


GRADIENTS: dict[str, Rule] = {
    "aten.embedding_dense_backward": _embedding,
    "aten._log_softmax_backward_data": _log_softmax,
}
"""Convolution and pooling have their own modules, `convolution` and `pooling`; recurrent layers theirs, `recurrent`."""
