"""Interpolation and circular padding as tracing sees them.

PyTorch's decompositions of `F.interpolate` scatter its gradient pixel by pixel: here it is one operator,
``fedge.resize``. Circular padding writes into an empty tensor: here it is a concatenation.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError

_SETTINGS = "str mode, bool? align_corners, float[] scales, bool antialias"
torch.library.define("fedge::resize", f"(Tensor x, int[] before, int[] after, {_SETTINGS}) -> Tensor")
torch.library.define("fedge::resize_backward", f"(Tensor grad, int[] before, int[] after, {_SETTINGS}) -> Tensor")


def _resized(x: Tensor, before: Sequence[int], after: Sequence[int], *_: object) -> Tensor:
    return x.new_empty((*x.shape[:2], *after))


def _unresized(grad: Tensor, before: Sequence[int], after: Sequence[int], *_: object) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *before))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _toward_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    settings = ctx.settings
    return torch.ops.fedge.resize_backward(grad, *settings), *[None] * len(settings)


torch.library.register_fake("fedge::resize", _resized)
torch.library.register_fake("fedge::resize_backward", _unresized)
torch.library.register_autograd("fedge::resize", _toward_input, setup_context=_remember)


class SpatialMode(TorchFunctionMode):
    """While active, `F.interpolate` is one operator, and `F.pad` pads circularly by concatenation."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace these two, refuse pooling at random, pass all other functions on."""
        given = kwargs or {}
        place = 3 if func is F.interpolate else 2
        mode = given.get("mode", args[place] if len(args) > place else None)
        # Resizing by areas is average pooling.
        if func is F.interpolate and mode != "area":
            return _interpolate(*args, **given)
        if func is F.pad and mode == "circular":
            return _pad_circular(*args, **given)
        name = getattr(func, "__name__", "")
        if name.startswith("fractional_max_pool"):
            raise ExportError(f"{name} draws its windows at random, which is not covered; use nn.AdaptiveMaxPool2d")
        return func(*args, **given)


def _interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    before = list(x.shape[2:])
    if not all(isinstance(n, int) for n in before):
        raise ExportError(f"an image size of {before} to interpolate from depends on the batch; use fixed sizes")
    # On nothing: PyTorch checks the arguments, and knows what size comes out.
    probe = torch.empty((1, 1, *before), device="meta")
    after = F.interpolate(probe, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias).shape[2:]
    scales: list[float] = []
    if scale_factor is not None and not recompute_scale_factor:
        scales = [float(s) for s in (scale_factor if isinstance(scale_factor, Sequence) else [scale_factor])]
        scales *= 1 if len(scales) == len(before) else len(before)
    settings = (before, list(after), mode, align_corners, scales, antialias)
    result: Tensor = torch.ops.fedge.resize(x, *settings)
    return result


def _pad_circular(x: Tensor, pad: Sequence[int], mode: str = "", value: float | None = None) -> Tensor:
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = x.dim() - 1 - i
        start, cropped = max(-before, 0), x.shape[axis] + min(before, 0) + min(after, 0)
        x = x.narrow(axis, start, cropped)
        whole = [x]
        if before > 0:
            whole.insert(0, x.narrow(axis, cropped - before, before))
        if after > 0:
            whole.append(x.narrow(axis, 0, after))
        x = torch.cat(whole, axis)
    return x
