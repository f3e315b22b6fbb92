"""Max-pooling and its gradients; `average` has the other kind.

Max-pooling whose windows tile the input goes by slabs: each position in the window as a tensor of the output's size,
and elementwise operators over them, which stream through memory. ONNX's own MaxPool takes ten times longer when it is
asked for the indices that a gradient needs.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.errors import ExportError
from export.formulation import from_spatial_major, to_spatial_major
from export.lower import Lowering, Rule, Value, operator_name

Places = npt.NDArray[np.int64]


def pool_attributes(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool, rank: int
) -> dict[str, Any]:
    """ONNX attributes of a pooling window; PyTorch gives one number for all axes or one for each."""

    def each(values: Sequence[int]) -> list[int]:
        return [int(v) for v in values] * (1 if len(values) == rank else rank)

    pads = each(padding)
    return {
        "kernel_shape": each(kernel),
        "strides": each(stride or kernel),
        "pads": [*pads, *pads],
        "ceil_mode": int(ceil),
    }


def adaptive_windows(size: int, count: int) -> tuple[Places, Places]:
    """Starts and ends of ``count`` windows that cover an axis evenly; they overlap where it does not divide."""
    places = np.arange(count)
    return places * size // count, -((places + 1) * -size // count)


MOST_SLABS = 16
"""Largest pooling window whose positions are handled one by one."""


def pooled_slabs(b: Lowering, x: Value, kernel: Sequence[int], sizes: Sequence[int]) -> tuple[list[str], str]:
    """Windows that tile the input: each position in the window as a slab ``[*sizes, N, C]``, and their maximum.

    Space comes first, so that slabs are made of long runs of memory.
    """
    split = [n for size, k in zip(sizes, kernel, strict=True) for n in (size, k)]
    windows = b.op("Reshape", to_spatial_major(b, x.name, x.rank), b.ints([*split, -1, *x.static(1)]))
    axes = range(1, 2 * len(kernel), 2)
    slabs = [
        b.op("Slice", windows, b.ints(place), b.ints(p + 1 for p in place), b.ints(axes))
        for place in itertools.product(*map(range, kernel))
    ]
    slabs = [b.op("Reshape", slab, b.ints([*sizes, -1, *x.static(1)])) for slab in slabs]
    return slabs, b.op("Max", *slabs)


def tiles(x: Value, attributes: dict[str, Any], dilation: Sequence[int]) -> bool:
    """Whether pooling windows tile ``x`` exactly, and are few enough to go position by position."""
    kernel = attributes["kernel_shape"]
    plain = kernel == attributes["strides"] and not any(attributes["pads"]) and set(dilation) == {1}
    divisible = all(size % k == 0 for size, k in zip(x.static(*range(2, x.rank)), kernel, strict=True))
    return plain and divisible and math.prod(kernel) <= MOST_SLABS


def _exactly(attributes: dict[str, Any], x: Value, out: Value, dilation: Sequence[int]) -> dict[str, Any]:
    """The attributes with as much padding at the end as the windows of ``out`` reach, instead of ``ceil_mode``.

    ONNX Runtime and PyTorch differ in which of the last windows they leave out.
    """
    axes = range(2, x.rank)
    before = attributes["pads"][: x.rank - 2]
    ends = [
        max(p, (count - 1) * s - p + d * (k - 1) + 1 - size)
        for size, count, k, s, p, d in zip(
            x.static(*axes),
            out.static(*axes),
            attributes["kernel_shape"],
            attributes["strides"],
            before,
            dilation,
            strict=True,
        )
    ]
    return attributes | {"pads": [*before, *ends], "ceil_mode": 0}


def _max_pool(
    b: Lowering,
    out: Sequence[Value | None],
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> tuple[str | None, ...]:
    spread = [int(d) for d in dilation] * (1 if len(dilation) == x.rank - 2 else x.rank - 2)
    attributes = pool_attributes(kernel, stride, padding, ceil, x.rank - 2)
    # Without indices, which would be slow; the gradient rule finds its own way.
    if out[0] is None or not _only_gradients_read_indices(b):
        raise ExportError("the indices of max-pooling are not covered; instead of MaxUnpool use nn.Upsample")
    if out[1] is not None and tiles(x, attributes, spread):
        # The gradient needs the slabs too; pooling them saves reading the input once more.
        top = pooled_slabs(b, x, attributes["kernel_shape"], out[0].static(*range(2, x.rank)))[1]
        return from_spatial_major(b, top, x.rank), None
    return b.op("MaxPool", x.name, dilations=spread, **_exactly(attributes, x, out[0], spread)), None


def _only_gradients_read_indices(b: Lowering) -> bool:
    readers = [reader for part in b.readers if part.args[1] == 1 for reader in part.users]
    return all(operator_name(reader.target).endswith("_backward") for reader in readers)


def _max_pool_backward(
    b: Lowering,
    out: Value,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
    _: object,
) -> str | Value:
    """Each output's gradient goes to the first maximum of its window, as in PyTorch."""
    attributes = pool_attributes(kernel, stride, padding, ceil, x.rank - 2)
    spread = [int(d) for d in dilation] * (1 if len(dilation) == x.rank - 2 else x.rank - 2)
    if tiles(x, attributes, spread):
        return _max_pool_by_slabs(b, grad, x, attributes["kernel_shape"])
    _, indices = b.ops("MaxPool", 2, x.name, dilations=spread, **_exactly(attributes, x, grad, spread))
    flat = b.op("Reshape", b.zeros(x.shape, out.dtype), b.ints([-1]))
    summed = b.op(
        "ScatterElements", flat, b.reshape(indices, [-1]), b.reshape(grad.name, [-1]), axis=0, reduction="add"
    )
    return b.reshape(summed, x.shape)


def _shared_out(b: Lowering, left: str, slabs: Sequence[str], top: str, dtype: str) -> list[str]:
    """What a slab of window positions takes is gone for those after it: that is how the first maximum wins."""
    parts: list[str] = []
    for slab in slabs[:-1]:
        taken = b.op("Mul", left, b.cast(b.op("Equal", slab, top), "bool", dtype))
        left = b.op("Sub", left, taken)
        parts.append(taken)
    return [*parts, left]


def _max_pool_by_slabs(b: Lowering, grad: Value, x: Value, kernel: Sequence[int]) -> str:
    sizes = grad.static(*range(2, grad.rank))
    slabs, top = pooled_slabs(b, x, kernel, sizes)
    parts = _shared_out(b, to_spatial_major(b, grad.name, grad.rank), slabs, top, x.dtype)
    thin = [n for size in sizes for n in (size, 1)]
    parts = [b.op("Reshape", part, b.ints([*thin, -1, *x.static(1)])) for part in parts]
    for i, k in reversed(list(enumerate(kernel))):
        parts = [b.op("Concat", *parts[j : j + k], axis=1 + 2 * i) for j in range(0, len(parts), k)]
    whole = b.op("Reshape", parts[0], b.ints([*x.static(*range(2, x.rank)), -1, *x.static(1)]))
    return from_spatial_major(b, whole, x.rank)


def _adaptive_table(x: Value, sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where in a flat plane the windows look: ``[windows, positions]``, shorter ones with the last one repeated."""
    spatial = x.static(*range(x.rank - len(sizes), x.rank))
    axes = [list(zip(*adaptive_windows(n, m), strict=True)) for n, m in zip(spatial, sizes, strict=True)]
    plane = np.arange(math.prod(spatial)).reshape(spatial)
    windows = [plane[tuple(slice(*ends) for ends in window)].ravel() for window in itertools.product(*axes)]
    most = max(len(window) for window in windows)
    return np.stack([np.pad(window, (0, most - len(window)), mode="edge") for window in windows])


def _adaptive_max_pool(
    b: Lowering, out: Sequence[Value | None], x: Value, sizes: Sequence[int]
) -> tuple[str | None, ...]:
    table = _adaptive_table(x, sizes)
    outer = x.shape[: x.rank - len(sizes)]
    seen = b.reshape(x.name, [*outer, math.prod(x.static(*range(len(outer), x.rank)))])
    if len(table) > 1:
        seen = b.op("Gather", seen, b.constant(table.ravel()), axis=len(outer))
    windows = b.reshape(seen, [*outer, *table.shape])
    top = b.reshape(b.reduce("ReduceMax", windows, [len(outer) + 1]), [*outer, *sizes])
    if out[1] is None:
        return top, None
    first = b.op("ArgMax", windows, axis=len(outer) + 1, keepdims=0)
    position = b.op("Add", first, b.constant(np.arange(len(table)) * table.shape[1]))
    return top, b.reshape(b.op("Gather", b.constant(table.ravel()), position), [*outer, *sizes])


def _adaptive_max_pool_backward(b: Lowering, out: Value, grad: Value, x: Value, indices: Value) -> str:
    outer = 2 if x.rank > 3 else 1
    flat = [*x.shape[:outer], math.prod(x.static(*range(outer, x.rank)))]
    windows = [*x.shape[:outer], math.prod(grad.static(*range(outer, x.rank)))]
    summed = b.op(
        "ScatterElements",
        b.zeros(flat, out.dtype),
        b.reshape(indices.name, windows),
        b.reshape(grad.name, windows),
        axis=outer,
        reduction="add",
    )
    return b.reshape(summed, x.shape)


POOLING: dict[str, Rule] = {
    **{f"aten.max_pool{n}d_with_indices": _max_pool for n in (2, 3)},
    **{f"aten.max_pool{n}d_with_indices_backward": _max_pool_backward for n in (2, 3)},
    **{f"aten.adaptive_max_pool{n}d": _adaptive_max_pool for n in (2, 3)},
    **{f"aten.adaptive_max_pool{n}d_backward": _adaptive_max_pool_backward for n in (2, 3)},
}
