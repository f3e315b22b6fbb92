"""Training of a bundle by `Trainer` beside a plain loop in PyTorch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer, _epoch_seed, _graph_seed
from edge_client.wire.messages import TrainPlan
from export.dropout import DropoutMode
from export.reference import make_optimizer

LossFunction = Callable[..., Tensor]
SEED = 4


def gathered(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Cross-entropy over the last axis."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), **options)


def assert_trains_as_pytorch(
    module: nn.Module,
    path: Path,
    data: Mapping[str, Any],
    loss: LossFunction = gathered,
    *,
    steps: int = 3,
    tolerance: float = 1e-3,
) -> None:
    """Some steps on one batch of all ``data`` give PyTorch's weights and buffers; so does evaluation.

    ``module`` is what was exported to ``path``; it is trained. The tolerance is relative to how far a tensor moved, or
    to a hundredth of its magnitude, or of how far the farthest moved: what is zero but for rounding has no scale.
    """
    bundle, source = Bundle.open(path), ArraySource(dict(data))
    manifest = bundle.manifest
    hypers = manifest.defaults() | ({"mu": 0.1} if manifest.proximal else {})
    control = np.sin(np.arange(bundle.layout.size)).astype(np.float32) * 0.01 if manifest.control else None
    plan = TrainPlan(steps=steps, batch_size=source.samples, hypers=hypers)
    trainer = Trainer(bundle)
    result = trainer.train(bundle.initial(), source, plan, seed=SEED, control=control)

    begin = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    controls = {} if control is None else bundle.layout.views(control)
    trained = {p.name for p in manifest.parameters if p.role == "trainable"}
    leaves = {name: p for name, p in module.named_parameters() if name in trained}
    optimizer = make_optimizer(manifest.optimizer.name, list(leaves.values()), hypers)
    module.train()
    for step in range(steps):
        (batch,) = source.batches(source.samples, seed=_epoch_seed(SEED, step))
        optimizer.zero_grad()
        with DropoutMode(torch.tensor(_graph_seed(SEED)), torch.tensor(step + 1)):
            value = _loss(module, loss, batch, bundle)
        value.backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                leaf.grad += hypers.get("mu", 0.0) * (leaf.detach() - begin[name])
                leaf.grad += torch.tensor(controls[name]) if control is not None else 0.0
        if hypers.get("max_norm", 0.0) > 0:
            nn.utils.clip_grad_norm_(leaves.values(), hypers["max_norm"])
        optimizer.step()
    np.testing.assert_allclose(result.loss, value.item(), rtol=5e-4, atol=1e-6)
    state = module.state_dict()
    _assert_moved_alike(bundle.layout.views(result.local), state, begin, tolerance)
    _assert_moved_alike(manifest.layout("buffer").views(result.buffers), state, begin, tolerance)

    sums = trainer.evaluate(result.local, source, buffers=result.buffers)
    module.eval()
    with torch.no_grad():
        want = _loss(module, loss, data, bundle).item()
    np.testing.assert_allclose(sums["loss"] / sums["count"], want, rtol=1e-3, atol=1e-6)


def _loss(module: nn.Module, loss: LossFunction, batch: Mapping[str, Any], bundle: Bundle) -> Tensor:
    outputs = module(*(torch.tensor(batch[feature.name]) for feature in bundle.manifest.inputs))
    return loss(outputs, *(torch.tensor(batch[feature.name]) for feature in bundle.manifest.targets))


def _assert_moved_alike(
    found: Mapping[str, Any], state: Mapping[str, Tensor], begin: Mapping[str, Tensor], tolerance: float
) -> None:
    moved = {name: _largest(state[name].numpy() - begin[name].numpy()) for name in found}
    farthest = max(moved.values(), default=0.0)
    for name, got in found.items():
        want = state[name].numpy().astype(np.float64)
        scale = max(moved[name], 0.01 * _largest(want), 0.01 * farthest, 1e-7)
        worst = _largest(got - want) / scale
        assert worst <= tolerance, f"{name} is off by {worst:.1e} of what it moved"


def _largest(values: Any) -> float:
    return float(np.abs(values.astype(np.float64)).max(initial=0))
