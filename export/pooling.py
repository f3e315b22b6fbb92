"""Max-pooling and its gradients; `average` has the other kind.

Max-pooling whose windows lie side by side goes by slabs: each position in the window as a tensor of the output's size,
and elementwise operators over them, which stream through memory. ONNX's own MaxPool takes ten times longer when it is
asked for the indices that a gradient needs.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.errors import ExportError
from export.formulation import from_spatial_major, to_spatial_major
from export.lower import Lowering, Rule, Value, operator_name

Places = npt.NDArray[np.int64]


def per_axis(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """A number for each axis; PyTorch also gives one for all of them."""
    return tuple(int(v) for v in values) * (1 if len(values) == axes else axes)


def with_channels(axes: int, rule: Rule) -> Rule:
    """``rule`` for an operator over the last ``axes`` axes, for tensors ``[N, C, *axes]`` only."""

    def checked(b: Lowering, out: Any, x: Value, *arguments: Any, **named: Any) -> str | tuple[str | None, ...] | Value:
        if x.rank != axes + 2:
            raise ExportError(
                f"found {x.rank} dimensions, expected a batch, channels and {axes} more; unsqueeze(1) first"
            )
        return rule(b, out, x, *arguments, **named)

    return checked


def adaptive_windows(size: int, count: int) -> tuple[Places, Places]:
    """Starts and ends of ``count`` windows that cover an axis evenly; they overlap where it does not divide."""
    places = np.arange(count)
    return places * size // count, -((places + 1) * -size // count)


MOST_SLABS = 16
"""Largest pooling window whose positions are handled one by one."""


@dataclass(frozen=True)
class Windows:
    """Where max-pooling looks, along each spatial axis; ``ends`` is the padding that the last windows need."""

    sizes: tuple[int, ...]
    results: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Instead of ONNX's ``ceil_mode``: it differs from PyTorch's in which of the last windows it leaves out."""
        return tuple(
            max(p, (count - 1) * s - p + d * (k - 1) + 1 - size)
            for size, count, k, s, p, d in zip(
                self.sizes, self.results, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    @property
    def apart(self) -> bool:
        """Whether windows lie side by side, and are few enough in positions to go by slabs.

        Where they overlap, ONNX's indices and a scatter take no longer.
        """
        return self.kernel == self.stride and set(self.dilation) == {1} and math.prod(self.kernel) <= MOST_SLABS

    def pool(self, b: Lowering, x: str, outputs: int) -> list[str]:
        """ONNX's own operator, with its second output if ``outputs`` is 2."""
        return b.ops(
            "MaxPool",
            outputs,
            x,
            kernel_shape=self.kernel,
            strides=self.stride,
            pads=[*self.padding, *self.ends],
            dilations=self.dilation,
        )

    def slabs(self, b: Lowering, x: Value) -> tuple[list[str], str]:
        """Each position in the window as a slab ``[*results, N, C]``, and their maximum.

        Space comes first, so that slabs are made of long runs of memory.
        """
        name = to_spatial_major(b, x.name, x.rank)
        if any(self.padding) or any(self.ends):
            pads = b.ints([*self.padding, 0, 0, *self.ends, 0, 0])
            name = b.op("Pad", name, pads, b.scalar(-math.inf, x.dtype))
        axes, steps = b.ints(range(len(self.sizes))), b.ints(self.stride)
        reach = [(count - 1) * s + 1 for count, s in zip(self.results, self.stride, strict=True)]
        found = [
            b.op("Slice", name, b.ints(place), b.ints(p + r for p, r in zip(place, reach, strict=True)), axes, steps)
            for place in itertools.product(*map(range, self.kernel))
        ]
        return found, b.op("Max", *found)

    def interleave(self, b: Lowering, parts: Sequence[str], x: Value) -> str:
        """Slabs ``[*results, N, C]`` of windows side by side back to ``[N, C, *sizes]``; zero where there are none."""
        thin = b.ints([*(n for count in self.results for n in (count, 1)), -1, *x.static(1)])
        parts = [b.op("Reshape", part, thin) for part in parts]
        for i, k in reversed(list(enumerate(self.kernel))):
            if k > 1:
                parts = [b.op("Concat", *parts[j : j + k], axis=1 + 2 * i) for j in range(0, len(parts), k)]
        whole = [count * k for count, k in zip(self.results, self.kernel, strict=True)]
        name = b.op("Reshape", parts[0], b.ints([*whole, -1, *x.static(1)]))
        ends = [size + p - n for size, p, n in zip(self.sizes, self.padding, whole, strict=True)]
        if any(self.padding) or any(ends):
            pads = b.ints([*(-p for p in self.padding), 0, 0, *ends, 0, 0])
            name = b.op("Pad", name, pads, b.scalar(0, x.dtype))
        return from_spatial_major(b, name, x.rank)


def _windows(
    x: Value,
    out: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Windows:
    axes = range(2, x.rank)
    each = [per_axis(values, x.rank - 2) for values in (kernel, stride or kernel, padding, dilation)]
    return Windows(x.static(*axes), out.static(*axes), *each)


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
    # Without indices, which would be slow; the gradient rule finds its own way.
    if out[0] is None or not _only_gradients_read_indices(b):
        raise ExportError("the indices of max-pooling are not covered; instead of MaxUnpool use nn.Upsample")
    windows = _windows(x, out[0], kernel, stride, padding, dilation)
    if out[1] is not None and windows.apart:
        # The gradient needs the slabs too; pooling them saves reading the input once more.
        return from_spatial_major(b, windows.slabs(b, x)[1], x.rank), None
    return windows.pool(b, x.name, 1)[0], None


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
) -> str:
    """Each output's gradient goes to the first maximum of its window, as in PyTorch."""
    windows = _windows(x, grad, kernel, stride, padding, dilation)
    if windows.apart:
        return _by_slabs(b, grad, x, windows)
    _, indices = windows.pool(b, x.name, 2)
    flat = b.op("Reshape", b.zeros(x.shape, out.dtype), b.ints([-1]))
    summed = b.op(
        "ScatterElements", flat, b.reshape(indices, [-1]), b.reshape(grad.name, [-1]), axis=0, reduction="add"
    )
    return b.reshape(summed, x.shape)


def _by_slabs(b: Lowering, grad: Value, x: Value, windows: Windows) -> str:
    slabs, top = windows.slabs(b, x)
    left = to_spatial_major(b, grad.name, grad.rank)
    parts: list[str] = []
    # What a slab of window positions takes is gone for those after it: that is how the first maximum wins.
    for slab in slabs[:-1]:
        taken = b.op("Mul", left, b.cast(b.op("Equal", slab, top), "bool", x.dtype))
        left = b.op("Sub", left, taken)
        parts.append(taken)
    return windows.interleave(b, [*parts, left], x)


def _adaptive_table(x: Value, sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where in a flat plane the windows look: ``[windows, positions]``, shorter ones with the last one repeated."""
    spatial = x.static(*range(2, x.rank))
    axes = [list(zip(*adaptive_windows(n, m), strict=True)) for n, m in zip(spatial, sizes, strict=True)]
    plane = np.arange(math.prod(spatial)).reshape(spatial)
    windows = [plane[tuple(slice(*ends) for ends in window)].ravel() for window in itertools.product(*axes)]
    most = max(len(window) for window in windows)
    return np.stack([np.pad(window, (0, most - len(window)), mode="edge") for window in windows])


def _adaptive_max_pool(
    b: Lowering, out: Sequence[Value | None], x: Value, sizes: Sequence[int]
) -> tuple[str | None, ...]:
    even = _even_windows(x, sizes)
    if even is not None and out[1] is not None:
        return from_spatial_major(b, even.slabs(b, x)[1], x.rank), None
    table = _adaptive_table(x, sizes)
    outer = x.shape[:2]
    seen = b.reshape(x.name, [*outer, math.prod(x.static(*range(2, x.rank)))])
    if len(table) > 1:
        seen = b.op("Gather", seen, b.constant(table.ravel()), axis=2)
    windows = b.reshape(seen, [*outer, *table.shape])
    top = b.reshape(b.reduce("ReduceMax", windows, [3]), [*outer, *sizes])
    if out[1] is None:
        return top, None
    first = b.op("ArgMax", windows, axis=3, keepdims=0)
    position = b.op("Add", first, b.constant(np.arange(len(table)) * table.shape[1]))
    return top, b.reshape(b.op("Gather", b.constant(table.ravel()), position), [*outer, *sizes])


def _even_windows(x: Value, sizes: Sequence[int]) -> Windows | None:
    """Adaptive windows where they lie side by side."""
    spatial = x.static(*range(2, x.rank))
    kernel = tuple(n // m for n, m in zip(spatial, sizes, strict=True))
    none = (0,) * len(sizes)
    windows = Windows(spatial, tuple(sizes), kernel, kernel, none, (1,) * len(sizes))
    divisible = all(n % m == 0 for n, m in zip(spatial, sizes, strict=True))
    return windows if divisible and windows.apart else None


def _adaptive_max_pool_backward(b: Lowering, out: Value, grad: Value, x: Value, indices: Value) -> str:
    even = _even_windows(x, grad.static(*range(2, x.rank)))
    if even is not None:
        return _by_slabs(b, grad, x, even)
    flat = [*x.shape[:2], math.prod(x.static(*range(2, x.rank)))]
    windows = [*x.shape[:2], math.prod(grad.static(*range(2, x.rank)))]
    summed = b.op(
        "ScatterElements",
        b.zeros(flat, out.dtype),
        b.reshape(indices.name, windows),
        b.reshape(grad.name, windows),
        axis=2,
        reduction="add",
    )
    return b.reshape(summed, x.shape)


_RULES: dict[str, Rule] = {
    "max_pool{}d_with_indices": _max_pool,
    "max_pool{}d_with_indices_backward": _max_pool_backward,
    "adaptive_max_pool{}d": _adaptive_max_pool,
    "adaptive_max_pool{}d_backward": _adaptive_max_pool_backward,
}
POOLING: dict[str, Rule] = {
    f"aten.{name.format(n)}": with_channels(n, rule) for n in (2, 3) for name, rule in _RULES.items()
}
