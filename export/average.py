"""Average pooling, adaptive or not, and its gradients.

An average over windows is one sparse matrix along each axis. Where windows are plain, ONNX's own operators read the
input once; the matrices are for what ONNX counts differently from PyTorch (windows that end beyond the padding), or
does not have (divisors of one's own, uneven windows).
"""

import math
from collections.abc import Sequence

import numpy as np

from export.lower import Lowering, Rule, Value
from export.pooling import Places, adaptive_windows, per_axis, with_channels
from export.separable import AxisMap, along_axes


def _windows(
    x: Value, out: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[tuple[Places, Places]]:
    """Starts and ends of the windows along each axis, in coordinates of the input; ends within the padding."""
    axes = range(2, x.rank)
    found = []
    for size, count, k, s, p in zip(x.static(*axes), out.static(*axes), kernel, stride, padding, strict=True):
        starts = np.arange(count) * s - p
        found.append((starts, np.minimum(starts + k, size + p)))
    return found


def _maps(
    x: Value,
    out: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor: int | None,
) -> list[AxisMap]:
    maps = []
    for axis, (starts, ends) in enumerate(_windows(x, out, kernel, stride, padding)):
        size = x.static(2 + axis)[0]
        inside = np.maximum(starts, 0), np.minimum(ends, size)
        lengths = ends - starts if count_include_pad else inside[1] - inside[0]
        if divisor is not None:
            lengths = np.full_like(lengths, divisor if axis == 0 else 1)
        maps.append(AxisMap.of_windows(size, *inside, lengths))
    return maps


def _overhangs(x: Value, out: Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether ``ceil_mode`` made a window that ends beyond the padding."""
    axes = range(2, x.rank)
    return any(
        (count - 1) * s - p + k > size + p
        for size, count, k, s, p in zip(x.static(*axes), out.static(*axes), kernel, stride, padding, strict=True)
    )


def _avg_pool(
    b: Lowering,
    out: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> str:
    size, steps, pads = (per_axis(values, x.rank - 2) for values in (kernel, stride or kernel, padding))
    if divisor is not None or _overhangs(x, out, size, steps, pads):
        return along_axes(b, x, _maps(x, out, size, steps, pads, count_include_pad, divisor))
    return b.op(
        "AveragePool",
        x.name,
        kernel_shape=size,
        strides=steps,
        pads=pads * 2,
        count_include_pad=int(count_include_pad),
    )


def _avg_pool_backward(
    b: Lowering,
    out: Value,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> str:
    size, steps, pads = (per_axis(values, x.rank - 2) for values in (kernel, stride or kernel, padding))
    counted = count_include_pad or not any(pads)
    if not counted or _overhangs(x, grad, size, steps, pads):
        maps = _maps(x, grad, size, steps, pads, count_include_pad, divisor)
        return along_axes(b, grad, [found.transposed() for found in maps])
    channels, *spatial = x.static(*range(1, x.rank))
    weight = b.constant(np.full((channels, 1, *size), 1 / (divisor or math.prod(size)), np.float32))
    got = grad.static(*range(2, x.rank))
    extra = [n - ((g - 1) * t - 2 * p + k) for n, g, t, p, k in zip(spatial, got, steps, pads, size, strict=True)]
    return b.op(
        "ConvTranspose",
        grad.name,
        weight,
        strides=steps,
        pads=pads * 2,
        group=channels,
        output_padding=extra,
    )


def _adaptive_maps(x: Value, sizes: Sequence[int]) -> list[AxisMap]:
    maps = []
    for size, count in zip(x.static(*range(x.rank - len(sizes), x.rank)), sizes, strict=True):
        starts, ends = adaptive_windows(size, count)
        maps.append(AxisMap.of_windows(size, starts, ends, ends - starts))
    return maps


def _adaptive(b: Lowering, out: Value, x: Value, sizes: Sequence[int]) -> str:
    return along_axes(b, x, _adaptive_maps(x, out.static(*range(x.rank - len(sizes), x.rank))))


def _adaptive_backward(axes: int) -> Rule:
    def rule(b: Lowering, out: Value, grad: Value, x: Value) -> str:
        maps = _adaptive_maps(x, grad.static(*range(x.rank - axes, x.rank)))
        return along_axes(b, grad, [found.transposed() for found in maps])

    return rule


AVERAGE: dict[str, Rule] = {
    **{f"aten.avg_pool{n}d": with_channels(n, _avg_pool) for n in (2, 3)},
    **{f"aten.avg_pool{n}d_backward": with_channels(n, _avg_pool_backward) for n in (2, 3)},
    **{f"aten._adaptive_avg_pool{n}d": _adaptive for n in (2, 3)},
    **{f"aten._adaptive_avg_pool{n}d_backward": _adaptive_backward(n) for n in (2, 3)},
}
