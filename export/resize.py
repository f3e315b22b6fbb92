"""Resizing by interpolation: nearest, linear and cubic, in one, two and three dimensions.

What an interpolation does along an axis is read off PyTorch itself, by interpolating the identity: whatever its modes
do with borders, corners and scales is exact. `spatial` puts the operators into the traced graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Value
from export.separable import AxisMap, along_axes

PLANAR = {"linear": "bilinear", "trilinear": "bilinear"}
"""The two-dimensional name of an interpolation that has another for each number of dimensions."""

LONGEST = 8192
"""Largest size, before or after, along an axis; the matrix is written out while the export makes its sparse form."""


def interpolation(
    before: int, after: int, mode: str, align_corners: bool | None, scale: float | None, antialias: bool
) -> AxisMap:
    """The map along one axis.

    Raises:
        ExportError: the axis is longer than `LONGEST`.
    """
    if max(before, after) > LONGEST:
        raise ExportError(
            f"interpolation from {before} to {after} along one axis exceeds {LONGEST}; use a transposed convolution"
        )
    # Along the width: with antialiasing, PyTorch itself errs on images one pixel wide.
    identity = torch.eye(before)[None, :, None, :]
    target: dict[str, Any] = {"size": (1, after)} if scale is None else {"scale_factor": (1.0, scale)}
    with torch.no_grad():
        columns = F.interpolate(
            identity, mode=PLANAR.get(mode, mode), align_corners=align_corners, antialias=antialias, **target
        )
    return AxisMap.of_dense(columns[0, :, 0, :].T.numpy().astype(np.float64))


def _maps(
    before: Sequence[int],
    after: Sequence[int],
    mode: str,
    align_corners: bool | None = None,
    scales: Sequence[float] = (),
    antialias: bool = False,
) -> list[AxisMap]:
    each: list[float | None] = [*scales] or [None] * len(before)
    return [
        interpolation(n, m, mode, align_corners, scale, antialias)
        for n, m, scale in zip(before, after, each, strict=True)
    ]


def _resize(b: Lowering, out: Value, x: Value, *settings: Any) -> str:
    return along_axes(b, x, _maps(*settings))


def _resize_backward(b: Lowering, out: Value, grad: Value, *settings: Any) -> str:
    return along_axes(b, grad, [found.transposed() for found in _maps(*settings)])


RESIZE: dict[str, Rule] = {"fedge.resize": _resize, "fedge.resize_backward": _resize_backward}
