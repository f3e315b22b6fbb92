"""Reductions over axes: sums, extrema, moments, norms, running sums."""

import math
from collections.abc import Sequence

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value
from export.operators import operand

Axes = Sequence[int] | int | None


def _axes(dim: Axes) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim or ())


def _reduced(kind: str) -> Rule:
    def rule(b: Lowering, out: Value, x: Value, dim: Axes = None, keepdim: bool = False, **_: object) -> str:
        return b.reduce(kind, operand(b, x, out.dtype), _axes(dim), keepdim)

    return rule


def _extremum(reduction: str, place: str) -> Rule:
    """``max`` and ``min``: of everything, or along an axis with the first place of each."""

    def rule(
        b: Lowering, out: object, x: Value, dim: int | None = None, keepdim: bool = False
    ) -> str | tuple[str, str | None]:
        name = b.cast(x.name, x.dtype, "int32") if x.dtype == "bool" else x.name
        kind = "int32" if x.dtype == "bool" else x.dtype
        value = b.cast(b.reduce(reduction, name, [] if dim is None else [dim], keepdim), kind, x.dtype)
        if dim is None:
            return value
        read = isinstance(out, list) and out[1] is not None
        return value, b.op(place, name, axis=dim, keepdims=int(keepdim)) if read else None

    return rule


def _place(kind: str) -> Rule:
    def rule(b: Lowering, out: Value, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
        name = b.cast(x.name, x.dtype, "int32") if x.dtype == "bool" else x.name
        if dim is None:
            return b.op(kind, b.reshape(name, [-1]), axis=0, keepdims=0)
        return b.op(kind, name, axis=dim, keepdims=int(keepdim))

    return rule


def _any(b: Lowering, out: Value, x: Value, dim: Axes = None, keepdim: bool = False) -> str:
    found = b.cast(b.cast(x.name, x.dtype, "bool"), "bool", "float32")
    return b.cast(b.reduce("ReduceMax", found, _axes(dim), keepdim), "float32", "bool")


def _moments(b: Lowering, x: Value, dim: Axes, correction: float | None, keepdim: bool) -> tuple[str, str]:
    """Variance in two passes, and mean."""
    axes = _axes(dim)
    mean = b.reduce("ReduceMean", x.name, axes, True)
    centred = b.op("Sub", x.name, mean)
    total = b.reduce("ReduceSum", b.op("Mul", centred, centred), axes, keepdim)
    count = math.prod(x.shape[axis] for axis in axes or range(x.rank))
    taken = b.op("Sub", b.number(count, x.dtype), b.scalar(1 if correction is None else correction, x.dtype))
    squeezed = mean if keepdim else b.op("Squeeze", mean, b.ints(axes or range(x.rank)))
    return b.op("Div", total, b.op("Max", taken, b.scalar(0, x.dtype))), squeezed


def _var(
    b: Lowering, out: Value, x: Value, dim: Axes = None, *, correction: float | None = None, keepdim: bool = False
) -> str:
    return _moments(b, x, dim, correction, keepdim)[0]


def _var_mean(
    b: Lowering, out: object, x: Value, dim: Axes = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[str, str]:
    return _moments(b, x, dim, correction, keepdim)


def _norm(
    b: Lowering, out: Value, x: Value, order: float = 2, dim: Axes = None, keepdim: bool = False, **_: object
) -> str:
    axes = _axes(dim)
    if order in (1, 2):
        return b.reduce(f"ReduceL{int(order)}", x.name, axes, keepdim)
    size = b.op("Abs", x.name)
    if math.isinf(order):
        return b.reduce("ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdim)
    if order == 0:
        return b.reduce("ReduceSum", b.op("Sign", size), axes, keepdim)
    total = b.reduce("ReduceSum", b.op("Pow", size, b.scalar(order, out.dtype)), axes, keepdim)
    return b.op("Pow", total, b.scalar(1 / order, out.dtype))


def _prod(b: Lowering, out: Value, x: Value, dim: int | None = None, keepdim: bool = False, **_: object) -> str:
    return b.reduce("ReduceProd", operand(b, x, out.dtype), _axes(dim), keepdim)


def _cumsum(b: Lowering, out: Value, x: Value, dim: int, **_: object) -> str:
    if x.rank == 0:
        raise ExportError("a scalar has no running sum")
    return b.op("CumSum", operand(b, x, out.dtype), b.scalar(dim, "int64"))


MOST_FACTORS = 64
"""Longest axis whose running products are written out one by one."""


def _cumprod(b: Lowering, out: Value, x: Value, dim: int, **_: object) -> str:
    length = x.static(dim)[0]
    if length > MOST_FACTORS:
        raise ExportError(f"products along an axis of {length} are not supported; at most {MOST_FACTORS}")
    factors = b.ops("Split", length, x.name, axis=dim, num_outputs=length) if length > 1 else [x.name]
    products = factors[:1]
    for factor in factors[1:]:
        products.append(b.op("Mul", products[-1], factor))
    return b.op("Concat", *products, axis=dim)


REDUCTIONS: dict[str, Rule] = {
    "aten.sum": _reduced("ReduceSum"),
    "aten.mean": _reduced("ReduceMean"),
    "aten.amax": _reduced("ReduceMax"),
    "aten.amin": _reduced("ReduceMin"),
    "aten.max": _extremum("ReduceMax", "ArgMax"),
    "aten.min": _extremum("ReduceMin", "ArgMin"),
    "aten.argmax": _place("ArgMax"),
    "aten.argmin": _place("ArgMin"),
    "aten.any": _any,
    "aten.var": _var,
    "aten.var_mean": _var_mean,
    "aten.linalg_vector_norm": _norm,
    "aten.prod": _prod,
    "aten.cumsum": _cumsum,
    "aten.cumprod": _cumprod,
}
