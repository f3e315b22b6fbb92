"""Padding by reflection and replication with their gradients, rolling and flipping."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value
from export.separable import AxisMap, along_axes


def _maps(sizes: Sequence[int], pads: Sequence[int], mode: Any) -> list[AxisMap]:
    """What padding does along each axis; ``pads`` as PyTorch has them, last axis first. Negative ones crop."""
    maps = []
    for size, before, after in zip(sizes, pads[-2::-2], pads[::-2], strict=True):
        places = np.pad(np.arange(size), (max(before, 0), max(after, 0)), mode=mode)
        maps.append(AxisMap.of_places(size, places[max(-before, 0) : len(places) - max(-after, 0)]))
    return maps


def _padded(mode: str) -> Rule:
    def rule(b: Lowering, out: Value, x: Value, pads: Sequence[int]) -> str:
        axes = len(pads) // 2
        if min(pads) < 0:
            return along_axes(b, x, _maps(x.static(*range(x.rank - axes, x.rank)), pads, mode))
        none = [0] * (x.rank - axes)
        return b.op("Pad", x.name, b.ints([*none, *pads[-2::-2], *none, *pads[::-2]]), mode=mode)

    return rule


def _padded_backward(mode: str) -> Rule:
    def rule(b: Lowering, out: Value, grad: Value, x: Value, pads: Sequence[int]) -> str:
        spatial = range(x.rank - len(pads) // 2, x.rank)
        return along_axes(b, grad, [found.transposed() for found in _maps(x.static(*spatial), pads, mode)])

    return rule


def _roll(b: Lowering, out: Value, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> str:
    name = x.name
    if not dims:
        raise ExportError("roll without dims goes over the batch; give it dims=")
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.static(dim)[0]
        if cut:
            front, back = b.slice(name, [dim], [0], [cut]), b.slice(name, [dim], [cut], [2**62])
            name = b.op("Concat", back, front, axis=dim)
    return name


def _flip(b: Lowering, out: Value, x: Value, dims: Sequence[int]) -> str:
    count = len(dims)
    return b.slice(x.name, dims, [-1] * count, [-(2**62)] * count, -1) if dims else x.name


PADDING: dict[str, Rule] = {
    **{f"aten.reflection_pad{n}d": _padded("reflect") for n in (1, 2, 3)},
    **{f"aten.reflection_pad{n}d_backward": _padded_backward("reflect") for n in (1, 2, 3)},
    **{f"aten.replication_pad{n}d": _padded("edge") for n in (1, 2, 3)},
    **{f"aten.replication_pad{n}d_backward": _padded_backward("edge") for n in (1, 2, 3)},
    "aten.roll": _roll,
    "aten.flip": _flip,
}
