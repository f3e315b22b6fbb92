"""Max-pooling and its gradients; `average` has the other kind.

The gradient of max-pooling goes by slabs: each position in the window as a tensor of the output's size, and elementwise
operators over them, which stream through memory. ONNX's own MaxPool takes ten times longer when it is asked for the
indices that a gradient needs.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_client.errors import ExportError
from export.formulation import from_spatial_major, to_spatial_major
from export.lower import Lowering, Rule, Value, operator_name

Places = npt.NDArray[np.int64]


def per_axis(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """A number for each axis; PyTorch also gives one for all of them."""
    return tuple(int(v) for v in values) * (1 if len(values) == axes else axes)


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
        """Whether no two windows share a position."""
        return self.kernel == self.stride and set(self.dilation) == {1} and not any(self.padding)

    @property
    def places(self) -> list[tuple[int, ...]]:
        """The positions in a window, in the order in which PyTorch compares them, as distances from its start."""
        return [
            tuple(t * d for t, d in zip(tap, self.dilation, strict=True))
            for tap in itertools.product(*map(range, self.kernel))
        ]

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
            for place in self.places
        ]
        return found, b.op("Max", *found)

    def spread(self, b: Lowering, parts: Sequence[str], x: Value) -> str:
        """The sum ``[N, C, *sizes]`` of ``parts``, one ``[*results, N, C]`` for each position in the window.

        Positions that are whole strides apart fall on the same cells: those are summed, shifted against each other;
        then the cells of all remainders are interleaved.
        """
        lengths = [
            count + d * (k - 1) // s
            for count, k, s, d in zip(self.results, self.kernel, self.stride, self.dilation, strict=True)
        ]
        cells: dict[tuple[int, ...], list[str]] = {
            remainder: [] for remainder in itertools.product(*map(range, self.stride))
        }
        zero = b.scalar(0, x.dtype)
        for place, part in zip(self.places, parts, strict=True):
            before = [p // s for p, s in zip(place, self.stride, strict=True)]
            after = [n - count - a for n, count, a in zip(lengths, self.results, before, strict=True)]
            moved = b.op("Pad", part, b.ints([*before, 0, 0, *after, 0, 0]), zero) if any(before + after) else part
            cells[tuple(p % s for p, s in zip(place, self.stride, strict=True))].append(moved)
        thin = b.ints([*(n for length in lengths for n in (length, 1)), -1, *x.static(1)])
        rows = []
        for found in cells.values():
            # A stride longer than the kernel, or sharing a divisor with the dilation, leaves cells that nothing sees.
            found = found or [b.zeros([*lengths, *x.shape[:2]], x.dtype)]
            rows.append(b.op("Reshape", b.op("Sum", *found) if len(found) > 1 else found[0], thin))
        for i, s in reversed(list(enumerate(self.stride))):
            if s > 1:
                rows = [b.op("Concat", *rows[j : j + s], axis=1 + 2 * i) for j in range(0, len(rows), s)]
        whole = [n * s for n, s in zip(lengths, self.stride, strict=True)]
        name = b.op("Reshape", rows[0], b.ints([*whole, -1, *x.static(1)]))
        ends = [size + p - n for size, p, n in zip(self.sizes, self.padding, whole, strict=True)]
        if any(self.padding) or any(ends):
            name = b.op("Pad", name, b.ints([*(-p for p in self.padding), 0, 0, *ends, 0, 0]), zero)
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
    if out[1] is not None and windows.apart and len(windows.places) <= MOST_SLABS:
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
    if len(windows.places) <= MOST_SLABS:
        slabs, top = windows.slabs(b, x)
        parts = _shared_out(b, to_spatial_major(b, grad.name, grad.rank), slabs, top, x.dtype)
        return windows.spread(b, parts, x)
    _, indices = windows.pool(b, x.name, 2)
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
