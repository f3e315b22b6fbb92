"""Training of a bundle by `Trainer` beside a plain loop in PyTorch."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer, _epoch_seed, _graph_seed
from edge_client.wire.messages import TrainPlan
from export.dropout import DropoutMode

LossFunction = Callable[..., Tensor]
Arrays = dict[str, npt.NDArray[np.generic]]


def gathered(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over the last axis."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def assert_trains_as_pytorch(
    module: nn.Module,
    path: Path,
    data: Arrays,
    loss: LossFunction = gathered,
    *,
    steps: int = 3,
    lr: float = 0.01,
    momentum: float | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Some steps on one batch of all ``data`` (inputs first) give PyTorch's weights and buffers; so does evaluation.

    ``module`` is what was exported to ``path`` with SGD, or with momentum; it is trained. The tolerance is relative to
    how far each tensor moved, or a hundredth of its magnitude where it moved less.
    """
    bundle, source = Bundle.open(path), ArraySource(data)
    inputs = [feature.name for feature in bundle.manifest.inputs]
    targets = [feature.name for feature in bundle.manifest.targets]
    rows = source.samples
    trainer = Trainer(bundle)
    hypers = {"lr": lr} | ({} if momentum is None else {"momentum": momentum})
    plan = TrainPlan(steps=steps, batch_size=rows, hypers=hypers)
    result = trainer.train(bundle.initial(), source, plan, seed=4)

    begin = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=momentum or 0.0)
    module.train()
    last = 0.0
    for step in range(steps):
        (batch,) = source.batches(rows, seed=_epoch_seed(4, step))
        optimizer.zero_grad()
        with DropoutMode(torch.tensor(_graph_seed(4)), torch.tensor(step + 1)):
            value = _loss(module, loss, batch, inputs, targets)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        last = value.item()
    np.testing.assert_allclose(result.loss, last, rtol=2e-4, atol=1e-6)
    found = bundle.layout.views(result.local) | bundle.manifest.layout("buffer").views(result.buffers)
    state = module.state_dict()
    for name, got in found.items():
        _assert_moved_alike(name, got, state[name].numpy(), begin[name].numpy(), tolerance)

    sums = trainer.evaluate(result.local, source, buffers=result.buffers)
    module.eval()
    with torch.no_grad():
        want = _loss(module, loss, data, inputs, targets).item()
    np.testing.assert_allclose(sums["loss"] / sums["count"], want, rtol=1e-3, atol=1e-6)


def _loss(
    module: nn.Module, loss: LossFunction, batch: Mapping[str, npt.NDArray[np.generic]], inputs: list[str], targets: list[str]
) -> Tensor:
    outputs = module(*(torch.tensor(batch[name]) for name in inputs))
    return loss(outputs, *(torch.tensor(batch[name]) for name in targets))


def _assert_moved_alike(
    name: str,
    got: npt.NDArray[np.generic],
    want: npt.NDArray[np.generic],
    begin: npt.NDArray[np.generic],
    tolerance: float,
) -> None:
    one, two, start = (array.astype(np.float64) for array in (got, want, begin))
    scale = max(float(np.abs(two - start).max(initial=0)), 0.01 * float(np.abs(two).max(initial=0)), 1e-5)
    worst = float(np.abs(one - two).max(initial=0)) / scale
    assert worst <= tolerance, f"{name} is off by {worst:.1e} of what it moved"
