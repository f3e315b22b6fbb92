"""Forward operators: ATen name -> how ONNX says it.

A rule is ``rule(b, out, *args, **kwargs)``: ``b`` emits nodes, ``out`` tells the result's shape and dtype, the
arguments are those of the ATen operator with tensors as `Value`. It returns the result's name, or a tuple of names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Size, Value, dtype_name

Scalar = int | float | torch.SymInt
Operand = Value | int | float


def _promoted(a: Operand, b: Operand) -> str:
    def sample(x: Operand) -> Any:
        return torch.empty((1,) * x.rank, dtype=getattr(torch, x.dtype)) if isinstance(x, Value) else x

    if not isinstance(a, Value) and not isinstance(b, Value):
        raise ExportError("an operator over two numbers")
    numbers = [1 if isinstance(x, torch.SymInt) else x for x in (sample(a), sample(b))]
    return dtype_name(torch.result_type(numbers[0], numbers[1]))


def operand(b: Lowering, x: Operand, dtype: str) -> str:
    """A tensor or number as a value of the given dtype."""
    return b.cast(x.name, x.dtype, dtype) if isinstance(x, Value) else b.number(x, dtype)


def _binary(kind: str) -> Rule:
    def rule(b: Lowering, out: Value, x: Operand, y: Operand, *, alpha: float = 1) -> str:
        left, right = operand(b, x, out.dtype), operand(b, y, out.dtype)
        if alpha != 1:
            right = b.op("Mul", right, b.scalar(alpha, out.dtype))
        return b.op(kind, left, right)

    return rule


def _compared(kind: str, negate: bool = False) -> Rule:
    def rule(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
        dtype = _promoted(x, y)
        result = b.op(kind, operand(b, x, dtype), operand(b, y, dtype))
        return b.op("Not", result) if negate else result

    return rule


def _unary(kind: str, **attributes: Any) -> Rule:
    return lambda b, out, x: b.op(kind, operand(b, x, out.dtype), **attributes)


def _pow(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
    if y == 2 and isinstance(x, Value):
        return b.op("Mul", x.name, x.name)
    return b.op("Pow", operand(b, x, out.dtype), operand(b, y, out.dtype))


def _logical(kind: str) -> Rule:
    return lambda b, out, x, y: b.op(kind, operand(b, x, "bool"), operand(b, y, "bool"))


def _where(b: Lowering, out: Value, condition: Value, x: Operand, y: Operand) -> str:
    return b.op("Where", condition.name, operand(b, x, out.dtype), operand(b, y, out.dtype))


def _clamp(b: Lowering, out: Value, x: Value, low: float | None = None, high: float | None = None) -> str:
    bounds = [b.scalar(v, out.dtype) if v is not None else "" for v in (low, high)]
    return b.op("Clip", operand(b, x, out.dtype), *bounds)


def _copy(b: Lowering, out: Value, x: Value, *_: object, **__: object) -> str:
    return operand(b, x, out.dtype)


def _overwritten(b: Lowering, out: Value, x: Value, source: Value, *_: object) -> str:
    given = operand(b, source, out.dtype)
    return given if source.shape == out.shape else b.op("Expand", given, b.sizes(out.shape))


def _full(b: Lowering, out: Value, _: object, value: float, **__: object) -> str:
    return b.zeros(out.shape, out.dtype, value)


def _filled(value: float) -> Rule:
    return lambda b, out, *_, **__: b.zeros(out.shape, out.dtype, value)


def _scalar_tensor(b: Lowering, out: Value, value: Scalar, **_: object) -> str:
    return b.number(value, out.dtype)


def _arange(b: Lowering, out: Value, start: Scalar, end: Scalar, step: Scalar = 1, **_: object) -> str:
    fixed = [v for v in (start, end, step) if not isinstance(v, torch.SymInt)]
    if len(fixed) == 3:
        return b.constant(np.arange(*fixed).astype(out.dtype))
    return b.op("Range", *[b.number(v, out.dtype) for v in (start, end, step)])


def _view(b: Lowering, out: Value, x: Value, *_: object) -> str:
    return b.reshape(x.name, out.shape)


def _expand(b: Lowering, out: Value, x: Value, *_: object, **__: object) -> str:
    return b.op("Expand", x.name, b.sizes(out.shape))


def _permute(b: Lowering, out: Value, x: Value, order: Sequence[int]) -> str:
    return b.transpose(x.name, [d % x.rank for d in order])


def _swap(b: Lowering, out: Value, x: Value, first: int = 0, second: int = 1) -> str:
    order = list(range(x.rank))
    if x.rank > 1:
        order[first], order[second] = order[second], order[first]
    return b.transpose(x.name, order)


def _slice(
    b: Lowering, out: Value, x: Value, dim: int = 0, start: int | None = None, end: Size | None = None, step: int = 1
) -> str:
    if not start and step == 1 and (end is None or (isinstance(end, int) and end > 2**60)):
        return x.name
    last = b.ints([2**62]) if end is None else b.size(end)
    return b.op("Slice", x.name, b.ints([start or 0]), last, b.ints([dim]), b.ints([step]))


def _select(b: Lowering, out: Value, x: Value, dim: int, index: int) -> str:
    return b.op("Gather", x.name, b.scalar(index, "int64"), axis=dim)


def _cat(b: Lowering, out: Value, tensors: Sequence[Value], dim: int = 0) -> str:
    return b.op("Concat", *[operand(b, t, out.dtype) for t in tensors], axis=dim)


def _stack(b: Lowering, out: Value, tensors: Sequence[Value], dim: int = 0) -> str:
    return b.op("Concat", *[b.op("Unsqueeze", t.name, b.ints([dim])) for t in tensors], axis=dim)


def _split(
    b: Lowering, out: Sequence[Value | None], x: Value, size: Size | Sequence[Size], dim: int = 0
) -> tuple[str, ...]:
    if isinstance(size, Sequence):
        sizes = list(size)
    else:
        sizes = [size] * (len(out) - 1)
        sizes.append(x.shape[dim] - sum(sizes))
    return tuple(b.ops("Split", len(out), x.name, b.sizes(sizes), axis=dim))


def _pad(b: Lowering, out: Value, x: Value, pads: Sequence[int], value: float = 0) -> str:
    before, after = [0] * x.rank, [0] * x.rank
    for i in range(len(pads) // 2):
        before[x.rank - 1 - i], after[x.rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return b.op("Pad", x.name, b.ints(before + after), b.scalar(value, out.dtype))


def _reduced(kind: str) -> Rule:
    def rule(
        b: Lowering, out: Value, x: Value, dim: Sequence[int] | int | None = None, keepdim: bool = False, **_: object
    ) -> str:
        axes = [dim] if isinstance(dim, int) else list(dim or ())
        return b.reduce(kind, operand(b, x, out.dtype), axes, keepdim)

    return rule


def _arg(kind: str) -> Rule:
    def rule(b: Lowering, out: Value, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
        if dim is None:
            return b.op("Squeeze", b.op(kind, b.reshape(x.name, [-1]), axis=0, keepdims=0))
        return b.op(kind, x.name, axis=dim, keepdims=int(keepdim))

    return rule


def _mm(b: Lowering, out: Value, x: Value, y: Value) -> str:
    return b.op("Gemm", x.name, y.name)


def _addmm(b: Lowering, out: Value, c: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> str:
    return b.op("Gemm", x.name, y.name, c.name, alpha=float(alpha), beta=float(beta))


def convolution(
    b: Lowering,
    out: Value,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    """ONNX's own convolution, plain or transposed."""
    extra = {"output_padding": list(output_padding)} if transposed else {}
    return b.op(
        "ConvTranspose" if transposed else "Conv",
        x.name,
        weight.name,
        *([bias.name] if bias is not None else []),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        **extra,
    )


def _embedding(b: Lowering, out: Value, weight: Value, indices: Value, *_: object) -> str:
    return b.op("Gather", weight.name, indices.name, axis=0)


def _index(b: Lowering, out: Value, x: Value, indices: Sequence[Value | None]) -> str:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype == "bool":
        raise ExportError("indexing with several tensors or with a mask is not supported")
    return b.op("Gather", x.name, given[0][1].name, axis=given[0][0])


OPERATORS: dict[str, Rule] = {
    "aten.add": _binary("Add"),
    "aten.sub": _binary("Sub"),
    "aten.mul": _binary("Mul"),
    "aten.div": _binary("Div"),
    "aten.maximum": _binary("Max"),
    "aten.minimum": _binary("Min"),
    "aten.pow": _pow,
    "aten.eq": _compared("Equal"),
    "aten.ne": _compared("Equal", negate=True),
    "aten.lt": _compared("Less"),
    "aten.le": _compared("LessOrEqual"),
    "aten.gt": _compared("Greater"),
    "aten.ge": _compared("GreaterOrEqual"),
    "aten.logical_and": _logical("And"),
    "aten.logical_or": _logical("Or"),
    "aten.bitwise_and": _logical("And"),
    "aten.bitwise_or": _logical("Or"),
    "aten.logical_not": _unary("Not"),
    "aten.bitwise_not": _unary("Not"),
    **{
        f"aten.{name}": _unary(name.capitalize())
        for name in ("neg", "exp", "log", "sqrt", "abs", "sign", "reciprocal", "sigmoid", "tanh", "relu", "erf")
    },
    **{f"aten.{name}": _unary(name.capitalize()) for name in ("sin", "cos", "floor", "ceil", "round")},
    "aten.rsqrt": lambda b, out, x: b.op("Reciprocal", b.op("Sqrt", x.name)),
    "aten.log1p": lambda b, out, x: b.op("Log", b.op("Add", x.name, b.scalar(1, out.dtype))),
    "aten.expm1": lambda b, out, x: b.op("Sub", b.op("Exp", x.name), b.scalar(1, out.dtype)),
    "aten.where": _where,
    "aten.clamp": _clamp,
    "aten._to_copy": _copy,
    "aten.copy": _overwritten,
    "aten.full": _full,
    "aten.full_like": _full,
    "aten.zeros": _filled(0),
    "aten.zeros_like": _filled(0),
    "aten.new_zeros": _filled(0),
    "aten.ones": _filled(1),
    "aten.ones_like": _filled(1),
    "aten.new_ones": _filled(1),
    "aten.scalar_tensor": _scalar_tensor,
    "aten.arange": _arange,
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten.reshape": _view,
    "aten.unsqueeze": _view,
    "aten.squeeze": _view,
    "aten.expand": _expand,
    "aten.permute": _permute,
    "aten.transpose": _swap,
    "aten.t": _swap,
    "aten.slice": _slice,
    "aten.select": _select,
    "aten.cat": _cat,
    "aten.stack": _stack,
    "aten.split": _split,
    "aten.split_with_sizes": _split,
    "aten.constant_pad_nd": _pad,
    "aten.sum": _reduced("ReduceSum"),
    "aten.mean": _reduced("ReduceMean"),
    "aten.amax": _reduced("ReduceMax"),
    "aten.amin": _reduced("ReduceMin"),
    "aten.argmax": _arg("ArgMax"),
    "aten.argmin": _arg("ArgMin"),
    "aten.mm": _mm,
    "aten.addmm": _addmm,
    "aten.bmm": lambda b, out, x, y: b.op("MatMul", x.name, y.name),
    "aten.embedding": _embedding,
    "aten.index": _index,
}
"""Each entry's key is an ATen operator without its overload."""
