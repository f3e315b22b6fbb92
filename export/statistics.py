"""Running statistics of batch normalisation whose rate depends on how many batches there were."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def cumulative_averages(module: nn.Module) -> Iterator[None]:
    """Trace layers with ``momentum=None``, whose rate 1 / n is a Python number that depends on the data.

    They take the statistics of the batch alone, and what they averaged before is weighed in afterwards.
    """
    before: dict[_NormBase, tuple[Tensor, Tensor]] = {}

    def enter(layer: nn.Module, _: object) -> None:
        assert isinstance(layer, _NormBase)
        if layer.training and layer.running_mean is not None and layer.running_var is not None:
            before[layer] = layer.running_mean.clone(), layer.running_var.clone()
            layer.momentum = 1.0

    def leave(layer: nn.Module, *_: object) -> None:
        assert isinstance(layer, _NormBase)
        if layer not in before:
            return
        layer.momentum = None
        assert layer.num_batches_tracked is not None
        count = layer.num_batches_tracked.to(torch.float32)
        for old, new in zip(before.pop(layer), (layer.running_mean, layer.running_var), strict=True):
            assert new is not None
            # Autograd has the statistics among what the gradient may read, which in training it does not.
            with _unsafe_preserve_version_counter(new):
                new.copy_(old + (new - old) / count)

    with ExitStack() as hooks:
        for layer in module.modules():
            if isinstance(layer, _NormBase) and layer.momentum is None:
                hooks.callback(layer.register_forward_pre_hook(enter).remove)
                hooks.callback(layer.register_forward_hook(leave).remove)
        try:
            yield
        finally:
            for layer in before:
                layer.momentum = None
