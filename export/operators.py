"""Forward operators: ATen name -> how ONNX says it.

A rule is ``rule(b, out, *args, **kwargs)``: ``b`` emits nodes, ``out`` tells the result's shape and dtype, the
arguments are those of the ATen operator with tensors as `Value`. It returns the result's name, or a tuple of names.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value, dtype_name

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


def _binary(kind: str, of_bools: str = "") -> Rule:
    def rule(b: Lowering, out: Value, x: Operand, y: Operand, *, alpha: float = 1) -> str:
        if out.dtype == "bool":
            return b.op(of_bools, operand(b, x, "bool"), operand(b, y, "bool"))
        left, right = operand(b, x, out.dtype), operand(b, y, out.dtype)
        if alpha != 1:
            right = b.op("Mul", right, b.scalar(alpha, out.dtype))
        return b.op(kind, left, right)

    return rule


def _truncated(b: Lowering, name: str) -> str:
    return b.op("Mul", b.op("Sign", name), b.op("Floor", b.op("Abs", name)))


def _divided(b: Lowering, out: Value, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> str:
    left, right = operand(b, x, out.dtype), operand(b, y, out.dtype)
    if out.dtype.startswith(("int", "uint")):
        # ONNX truncates quotients of integers, and its Mod has the divisor's sign.
        return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)) if rounding_mode == "floor" else left, right)
    quotient = b.op("Div", left, right)
    if rounding_mode == "floor":
        return b.op("Floor", quotient)
    return _truncated(b, quotient) if rounding_mode == "trunc" else quotient


def _remainder(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
    left, right = operand(b, x, out.dtype), operand(b, y, out.dtype)
    if out.dtype.startswith(("int", "uint")):
        return b.op("Mod", left, right)
    return b.op("Sub", left, b.op("Mul", b.op("Floor", b.op("Div", left, right)), right))


def _fmod(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
    return b.op("Mod", operand(b, x, out.dtype), operand(b, y, out.dtype), fmod=1)


def _compared(kind: str, negate: bool = False) -> Rule:
    def rule(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
        dtype = _promoted(x, y)
        result = b.op(kind, operand(b, x, dtype), operand(b, y, dtype))
        return b.op("Not", result) if negate else result

    return rule


def _unary(kind: str, **attributes: Any) -> Rule:
    return lambda b, out, x: b.op(kind, operand(b, x, out.dtype), **attributes)


def _pow(b: Lowering, out: Value, x: Operand, y: Operand) -> str:
    base = operand(b, x, out.dtype)
    if isinstance(y, Value) or not isinstance(x, Value):
        return b.op("Pow", base, operand(b, y, out.dtype))
    if y in (1, 2, 3):
        return base if y == 1 else b.op("Mul", base, base if y == 2 else b.op("Mul", base, base))
    if y in (0.5, -0.5, -1):
        root = base if y == -1 else b.op("Sqrt", base)
        return root if y > 0 else b.op("Reciprocal", root)
    return b.op("Pow", base, b.scalar(y, out.dtype))


def _hypot(b: Lowering, out: Value, x: Value, y: Value) -> str:
    return b.op("Sqrt", b.op("Add", b.op("Mul", x.name, x.name), b.op("Mul", y.name, y.name)))


def _scaled(kind: str, factor: float) -> Rule:
    return lambda b, out, x: b.op("Mul", b.op(kind, operand(b, x, out.dtype)), b.scalar(factor, out.dtype))


def _logical(kind: str) -> Rule:
    return lambda b, out, x, y: b.op(kind, operand(b, x, "bool"), operand(b, y, "bool"))


def _bitwise(kind: str) -> Rule:
    def rule(b: Lowering, out: Value, *operands: Operand) -> str:
        if out.dtype != "bool":
            raise ExportError(f"bitwise operators are covered on booleans; this one is on {out.dtype}")
        return b.op(kind, *(operand(b, x, "bool") for x in operands))

    return rule


def _where(b: Lowering, out: Value, condition: Value, x: Operand, y: Operand) -> str:
    return b.op("Where", condition.name, operand(b, x, out.dtype), operand(b, y, out.dtype))


def _clamp(b: Lowering, out: Value, x: Value, low: Operand | None = None, high: Operand | None = None) -> str:
    name = operand(b, x, out.dtype)
    if not isinstance(low, Value) and not isinstance(high, Value):
        return b.op("Clip", name, *[b.scalar(v, out.dtype) if v is not None else "" for v in (low, high)])
    if low is not None:
        name = b.op("Max", name, operand(b, low, out.dtype))
    return b.op("Min", name, operand(b, high, out.dtype)) if high is not None else name


def _relu(b: Lowering, out: Value, x: Value) -> str:
    # onnxruntime has no Relu of integers.
    return b.op("Relu", x.name) if x.dtype.startswith("float") else b.op("Max", x.name, b.scalar(0, x.dtype))


def _copy(b: Lowering, out: Value, x: Value, *_: object, **__: object) -> str:
    return operand(b, x, out.dtype)


def _full(b: Lowering, out: Value, _: object, value: float, **__: object) -> str:
    return b.zeros(out.shape, out.dtype, value)


def _empty(b: Lowering, out: Value, *_: object, **__: object) -> str:
    return b.zeros(out.shape, out.dtype)


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


OPERATORS: dict[str, Rule] = {
    "aten.add": _binary("Add", "Or"),
    "aten.sub": _binary("Sub"),
    "aten.mul": _binary("Mul", "And"),
    "aten.div": _divided,
    "aten.remainder": _remainder,
    "aten.fmod": _fmod,
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
    "aten.bitwise_and": _bitwise("And"),
    "aten.bitwise_or": _bitwise("Or"),
    "aten.logical_xor": _logical("Xor"),
    "aten.bitwise_xor": _bitwise("Xor"),
    "aten.logical_not": _unary("Not"),
    "aten.bitwise_not": _bitwise("Not"),
    **{
        f"aten.{name}": _unary(name.capitalize())
        for name in ("neg", "exp", "log", "sqrt", "abs", "sign", "reciprocal", "sigmoid", "tanh", "erf")
    },
    **{f"aten.{name}": _unary(name.capitalize()) for name in ("sin", "cos", "floor", "ceil", "round", "tan", "asin")},
    **{f"aten.{name}": _unary(name.capitalize()) for name in ("acos", "atan", "sinh", "cosh", "asinh", "acosh")},
    "aten.atanh": _unary("Atanh"),
    "aten.trunc": lambda b, out, x: _truncated(b, x.name),
    "aten.exp2": lambda b, out, x: b.op("Exp", b.op("Mul", x.name, b.scalar(math.log(2), out.dtype))),
    "aten.log2": _scaled("Log", 1 / math.log(2)),
    "aten.log10": _scaled("Log", 1 / math.log(10)),
    "aten.erfc": lambda b, out, x: b.op("Sub", b.scalar(1, out.dtype), b.op("Erf", x.name)),
    "aten.hypot": _hypot,
    "aten.isnan": lambda b, out, x: b.op("IsNaN", x.name),
    "aten.isinf": lambda b, out, x: b.op("IsInf", x.name),
    "aten.relu": _relu,
    "aten.rsqrt": lambda b, out, x: b.op("Reciprocal", b.op("Sqrt", x.name)),
    "aten.log1p": lambda b, out, x: b.op("Log", b.op("Add", x.name, b.scalar(1, out.dtype))),
    "aten.expm1": lambda b, out, x: b.op("Sub", b.op("Exp", x.name), b.scalar(1, out.dtype)),
    "aten.where": _where,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.clamp_max": lambda b, out, x, high: _clamp(b, out, x, None, high),
    "aten._to_copy": _copy,
    "aten.full": _full,
    "aten.full_like": _full,
    "aten.empty_permuted": _empty,
    "aten.scalar_tensor": _scalar_tensor,
    "aten.arange": _arange,
    "aten.view": _view,
    "aten.unsqueeze": _view,
    "aten.squeeze": _view,
    "aten.expand": _expand,
    "aten.permute": _permute,
    "aten.mm": _mm,
    "aten.addmm": _addmm,
    "aten.bmm": lambda b, out, x, y: b.op("MatMul", x.name, y.name),
    "aten.embedding": _embedding,
}
"""Each entry's key is an ATen operator without its overload."""
