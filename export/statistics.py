"""Running statistics of batch normalisation, as values that a graph returns."""

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, fx, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase

from edge_client.errors import ExportError

_WRITES = torch.ops.aten.native_batch_norm.default
_RETURNS = torch.ops.aten._native_batch_norm_legit_functional.default


def expose_statistics(graph: fx.Graph) -> None:
    """Let training-mode ``native_batch_norm`` return the statistics that it writes into its arguments.

    Its schema says nothing of that, so that no pass over in-place operators finds it.

    Raises:
        ExportError: it writes into an input of the graph, where nothing can follow.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not _WRITES or not node.args[5] or node.args[3] is None:
            continue
        node.target = _RETURNS
        node.meta["val"] = (*node.meta["val"], node.args[3].meta["val"], node.args[4].meta["val"])
        for result, written in enumerate(node.args[3:5], start=3):
            if written.op == "placeholder":
                raise ExportError(
                    "batch normalisation changes its statistics, which are inputs of the graph; clone them"
                )
            with graph.inserting_after(node):
                new = graph.call_function(operator.getitem, (node, result))
            new.meta = {**node.meta, "val": written.meta["val"]}
            for user in list(written.users):
                if user not in (node, new) and order.get(user, -1) > order[node]:
                    user.replace_input_with(written, new)


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
