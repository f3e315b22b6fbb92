"""Sliding windows as tensors, and their sum back: `F.unfold`, `F.fold` and `Tensor.unfold`; gradients of each other."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from export.lower import Lowering, Rule, Value
from export.separable import AxisMap, along_axes


def _im2col(
    b: Lowering,
    out: Value,
    x: Value,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> str:
    outer = x.shape[:-2]
    height, width = (size + 2 * p for size, p in zip(x.static(-2, -1), padding, strict=True))
    name = x.name
    if any(padding):
        pads = [*[0] * len(outer), *padding]
        name = b.op("Pad", name, b.ints(pads * 2), b.scalar(0, x.dtype))
    rows, columns = (
        np.arange(k)[:, None] * d + np.arange(0, size - d * (k - 1), s)[None]
        for k, d, s, size in zip(kernel, dilation, stride, (height, width), strict=True)
    )
    # [kernel, kernel, places, places], as PyTorch orders them.
    places = rows[:, None, :, None] * width + columns[None, :, None, :]
    flat = b.reshape(name, [*outer, height * width])
    return b.reshape(b.op("Gather", flat, b.constant(places.ravel()), axis=len(outer)), out.shape)


def _col2im(
    b: Lowering,
    out: Value,
    x: Value,
    sizes: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> str:
    summed = b.op(
        "Col2Im",
        x.name,
        b.ints(sizes),
        b.ints(kernel),
        dilations=list(dilation),
        pads=[*padding, *padding],
        strides=list(stride),
    )
    return b.reshape(summed, out.shape)


def _unfold(b: Lowering, out: Value, x: Value, dim: int, size: int, step: int) -> str:
    axis = dim % x.rank
    windows = b.op("Gather", x.name, b.constant(_windows(x.static(axis)[0], size, step)), axis=axis)
    order = [*range(axis + 1), *range(axis + 2, x.rank + 1), axis + 1]
    return b.transpose(windows, order)


def _unfold_backward(b: Lowering, out: Value, grad: Value, sizes: Sequence[int], dim: int, size: int, step: int) -> str:
    axis = dim % out.rank
    length = out.static(axis)[0]
    places = _windows(length, size, step)
    behind = b.transpose(grad.name, [*range(axis + 1), out.rank, *range(axis + 1, out.rank)])
    after = out.static(*range(axis + 1, out.rank)) if axis + 1 < out.rank else ()
    width = math.prod(after)
    flat = [*out.shape[:axis], places.size, width]
    joined = Value(b.reshape(behind, flat), tuple(flat), out.dtype)
    same = AxisMap.of_places(width, np.arange(width))
    summed = along_axes(b, joined, [AxisMap.of_places(length, places.ravel()).transposed(), same])
    return b.reshape(summed, out.shape)


def _windows(length: int, size: int, step: int) -> npt.NDArray[np.int64]:
    """Places of an axis that each window sees: ``[windows, size]``."""
    return np.arange(0, length - size + 1, step)[:, None] + np.arange(size)[None]


FOLDING: dict[str, Rule] = {
    "aten.im2col": _im2col,
    "aten.col2im": _col2im,
    "aten.unfold": _unfold,
    "aten.unfold_backward": _unfold_backward,
}
