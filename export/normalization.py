"""Normalisation and its gradients: batch, layer, group, instance and RMS.

`BatchNormalization` is the one operator of ONNX that normalises, or scales and shifts, channels in a single pass over
memory; its training form takes the variance in two passes over each channel, as PyTorch does. Whatever is normalised
together becomes a channel here: rows for layer normalisation, groups of an example for group normalisation.

Gradients, with ``h`` the normalised input and ``a = weight / std``: ``dx = a (dy - mean(dy) - h mean(dy h))``
(Ioffe and Szegedy 2015, arXiv 1502.03167). No other value of the input's size is kept or formed twice.
"""

import math
from collections.abc import Sequence

import numpy as np

from export.lower import Lowering, Rule, Size, Value

Sums = tuple[str | None, ...]


def _filled(b: Lowering, size: Size, value: float) -> str:
    return b.constant(np.full(size, value, np.float32)) if isinstance(size, int) else b.zeros([size], "float32", value)


def _affine(b: Lowering, x: str, size: Size, scale: str, shift: str | None, mean: str | None = None) -> str:
    """``(x - mean) * scale + shift`` over channels, axis 1, in one pass."""
    zero, one = _filled(b, size, 0), _filled(b, size, 1)
    return b.op("BatchNormalization", x, scale, shift or zero, mean or zero, one, epsilon=0.0)


def _inverse_std(b: Lowering, variance: str, eps: float) -> str:
    return b.op("Reciprocal", b.op("Sqrt", b.op("Add", variance, b.scalar(eps, "float32"))))


def _standardized(
    b: Lowering, x: str, shape: Sequence[Size], eps: float, scale: str | None = None, shift: str | None = None
) -> tuple[str, str, str]:
    """Every channel (axis 1) to mean 0 and variance 1, then scaled and shifted; with its mean and biased variance."""
    size, others = shape[1], [0, *range(2, len(shape))]
    # onnxruntime writes the statistics over those that it is given, be they constants that others read: give it two
    # vectors that are computed, that are unlike (or they would be merged), and whose values momentum 0 ignores.
    sample = b.slice(x, others, [0] * len(others), [1] * len(others))
    scratch = [b.reshape(b.op(kind, sample), [size]) for kind in ("Neg", "Abs")]
    scales = (scale or _filled(b, size, 1), shift or _filled(b, size, 0))
    found = b.ops("BatchNormalization", 3, x, *scales, *scratch, epsilon=eps, momentum=0.0, training_mode=1)
    return found[0], found[1], found[2]


def _moved(b: Lowering, running: Value, current: str, rate: str) -> str:
    return b.op("Add", running.name, b.op("Mul", b.op("Sub", current, running.name), rate))


def _batch_norm(
    b: Lowering,
    out: Sequence[Value | None],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[str | None, ...]:
    """Output, mean and 1 / std of the batch; in the functional form also the new running statistics."""
    channels = x.shape[1]
    scale, shift = (part.name if part is not None else None for part in (weight, bias))
    if not training and running_mean is not None and running_var is not None:
        inverse = _inverse_std(b, running_var.name, eps)
        factor = b.op("Mul", inverse, scale) if scale is not None else inverse
        empty = b.constant(np.zeros(0, np.float32))
        y = _affine(b, x.name, channels, factor, shift, running_mean.name)
        return (y, empty, empty, running_mean.name, running_var.name)[: len(out)]
    y, mean, variance = _standardized(b, x.name, x.shape, eps, scale, shift)
    found: list[str | None] = [y, mean, _inverse_std(b, variance, eps) if out[2] is not None else None]
    if len(out) == 5 and running_mean is not None and running_var is not None:
        rate, one = b.scalar(momentum, "float32"), b.scalar(1, "float32")
        found.append(_moved(b, running_mean, mean, rate))
        # Unbiased, n / (n - 1). A single value has no such variance; PyTorch refuses it, and here it changes none.
        count = b.number(math.prod(x.shape[:1] + x.shape[2:]), "float32")
        others = b.op("Sub", count, one)
        unbiased = b.op("Mul", variance, b.op("Div", count, b.op("Max", others, one)))
        found.append(_moved(b, running_var, unbiased, b.op("Mul", rate, b.op("Min", others, one))))
    return tuple(found)


def _batch_norm_stateless(
    b: Lowering,
    out: Sequence[Value | None],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[str | None, ...]:
    return _batch_norm(b, out, x, weight, bias, None, None, training, momentum, eps)


def _batch_norm_frozen(
    b: Lowering,
    out: Sequence[Value | None],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[str | None, ...]:
    return _batch_norm(b, out, x, weight, bias, running_mean, running_var, False, momentum, eps)


def _batch_norm_backward(
    b: Lowering,
    out: Sequence[Value | None],
    grad: Value,
    x: Value,
    weight: Value | None,
    running_mean: Value | None,
    running_var: Value | None,
    save_mean: Value | None,
    save_invstd: Value | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> Sums:
    channels, others = x.shape[1], [0, *range(2, x.rank)]
    along = [channels, *[1] * (x.rank - 2)]
    statistics = (save_mean, save_invstd) if training else (running_mean, running_var)
    assert statistics[0] is not None
    assert statistics[1] is not None
    mean = statistics[0].name
    inverse = statistics[1].name if training else _inverse_std(b, statistics[1].name, eps)
    scale = b.op("Mul", weight.name, inverse) if weight is not None else inverse
    shift_grad = b.reduce("ReduceSum", grad.name, others)
    normal = _affine(b, x.name, channels, inverse, None, mean)
    scale_grad = b.reduce("ReduceSum", b.op("Mul", grad.name, normal), others)
    if not training:
        moved = b.op("Mul", grad.name, b.reshape(scale, along))
    else:
        share = b.op("Div", scale, b.number(math.prod(x.shape[:1] + x.shape[2:]), "float32"))
        centred = _affine(b, grad.name, channels, scale, b.op("Neg", b.op("Mul", share, shift_grad)))
        moved = b.op("Sub", centred, b.op("Mul", normal, b.reshape(b.op("Mul", share, scale_grad), along)))
    return tuple(name if used else None for name, used in zip((moved, scale_grad, shift_grad), mask, strict=True))


def _layer_norm(
    b: Lowering, out: Sequence[Value], x: Value, shape: Sequence[Size], w: Value | None, bias: Value | None, eps: float
) -> tuple[str, ...]:
    scale = w.name if w is not None else b.constant(np.ones([int(s) for s in shape], np.float32))
    extra = [bias.name] if bias is not None else []
    # Before 1.32 onnxruntime took the variance as E[x^2] - E[x]^2, which is wrong for inputs far from zero.
    mean = b.reduce("ReduceMean", x.name, range(x.rank - len(shape), x.rank), True)
    centred = b.op("Sub", x.name, mean)
    y, _, inverse = b.ops("LayerNormalization", 3, centred, scale, *extra, axis=-len(shape), epsilon=eps)
    return y, mean, inverse


def _rows_gradient(
    b: Lowering, grad: str, normal: str, inverse: str, weight: str | None, rows: Size, width: int, centred: bool
) -> tuple[str, str]:
    """Gradient of rows ``[rows, width]`` that were normalised, then scaled by ``weight [width]``; and ``dy h``."""
    product = b.op("Mul", grad, normal)
    column = b.reshape(weight, [width, 1]) if weight is not None else b.constant(np.ones((width, 1), np.float32))
    share = b.op("Div", inverse, b.scalar(width, "float32"))
    scaled = b.op("Mul", grad, weight) if weight is not None else grad

    def total(values: str) -> str:
        return b.op("Mul", share, b.reshape(b.op("MatMul", values, column), [rows]))

    shift = b.op("Neg", total(grad)) if centred else None
    wide = _affine(b, b.op("Unsqueeze", scaled, b.ints([0])), rows, inverse, shift)
    pull = b.op("Mul", normal, b.reshape(total(product), [rows, 1]))
    return b.op("Sub", b.op("Squeeze", wide, b.ints([0])), pull), product


def _layer_norm_backward(
    b: Lowering,
    out: Sequence[Value | None],
    grad: Value,
    x: Value,
    shape: Sequence[int],
    mean: Value,
    rstd: Value,
    weight: Value | None,
    bias: Value | None,
    mask: Sequence[bool],
) -> Sums:
    width, rows = math.prod(int(s) for s in shape), math.prod(x.shape[: x.rank - len(shape)])
    inverse, dy = b.reshape(rstd.name, [rows]), b.reshape(grad.name, [rows, width])
    wide = b.reshape(x.name, [1, rows, width])
    normal = b.reshape(_affine(b, wide, rows, inverse, None, b.reshape(mean.name, [rows])), [rows, width])
    flat = b.reshape(weight.name, [width]) if weight is not None else None
    moved, product = _rows_gradient(b, dy, normal, inverse, flat, rows, width, True)
    return (
        b.reshape(moved, x.shape) if mask[0] else None,
        b.reshape(b.reduce("ReduceSum", product, [0]), shape) if mask[1] else None,
        b.reshape(b.reduce("ReduceSum", dy, [0]), shape) if mask[2] else None,
    )


def _group_norm(
    b: Lowering,
    out: Sequence[Value | None],
    x: Value,
    weight: Value | None,
    bias: Value | None,
    batch: Size,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[str, ...]:
    every = batch * groups
    together: list[Size] = [1, every, channels // groups * size]
    normal, mean, variance = _standardized(b, b.reshape(x.name, together), together, eps)
    y = b.reshape(normal, [batch, channels, size])
    if weight is not None or bias is not None:
        scale = weight.name if weight is not None else _filled(b, channels, 1)
        y = _affine(b, y, channels, scale, bias.name if bias is not None else None)
    inverse = _inverse_std(b, variance, eps)
    return b.reshape(y, x.shape), b.reshape(mean, [batch, groups]), b.reshape(inverse, [batch, groups])


def _group_norm_backward(
    b: Lowering,
    out: Sequence[Value | None],
    grad: Value,
    x: Value,
    mean: Value,
    rstd: Value,
    weight: Value | None,
    batch: Size,
    channels: int,
    size: int,
    groups: int,
    mask: Sequence[bool],
) -> Sums:
    every, each = batch * groups, channels // groups
    inverse = b.reshape(rstd.name, [every])
    together = b.reshape(x.name, [1, every, each * size])
    normal = _affine(b, together, every, inverse, None, b.reshape(mean.name, [every]))
    dy = b.reshape(grad.name, [batch, channels, size])
    product = b.op("Mul", dy, b.reshape(normal, [batch, channels, size]))
    sums = [b.reduce("ReduceSum", part, [2]) for part in (product, dy)]
    scales = b.reshape(rstd.name, [batch, groups, 1])
    factors = b.op("Expand", scales, b.ints([1, 1, each]))
    if weight is not None:
        factors = b.op("Mul", scales, b.reshape(weight.name, [1, groups, each]))
    # rstd * weight for every channel of every example; their products with the sums give the group's means.
    share = b.scalar(1 / (each * size), "float32")

    def total(part: str) -> str:
        of = b.reduce("ReduceSum", b.op("Mul", b.reshape(part, [batch, groups, each]), factors), [2], True)
        return b.op("Mul", of, share)

    along, across = (total(part) for part in sums)
    shift = b.op("Neg", b.op("Expand", across, b.sizes([batch, groups, each])))
    single = batch * channels
    centred = _affine(
        b, b.reshape(dy, [1, single, size]), single, b.reshape(factors, [single]), b.reshape(shift, [single])
    )
    pull = b.op("Mul", normal, b.reshape(along, [1, every, 1]))
    moved = b.op("Sub", b.reshape(centred, [1, every, each * size]), pull)
    weight_grad, bias_grad = (b.reduce("ReduceSum", part, [0]) for part in sums)
    return (
        b.reshape(moved, x.shape) if mask[0] else None,
        weight_grad if mask[1] else None,
        bias_grad if mask[2] else None,
    )


NORMALIZATION: dict[str, Rule] = {
    "aten._native_batch_norm_legit": _batch_norm_stateless,
    "aten._native_batch_norm_legit_no_training": _batch_norm_frozen,
    "aten._native_batch_norm_legit_functional": _batch_norm,
    "aten.native_batch_norm_backward": _batch_norm_backward,
    "aten.native_layer_norm": _layer_norm,
    "aten.native_layer_norm_backward": _layer_norm_backward,
    "aten.native_group_norm": _group_norm,
    "aten.native_group_norm_backward": _group_norm_backward,
}
