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
Numbers = dict[str, Any]
SEED, STEPS, ATTEMPTS, TOLERANCE, ROUNDINGS = 4, 3, 4, 1e-3, 8


def gathered(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Cross-entropy over the last axis."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), **options)


def assert_trains_as_pytorch(
    make: Callable[[], nn.Module], path: Path, draw: Callable[[int], Mapping[str, Any]], loss: LossFunction = gathered
) -> None:
    """Three steps on a batch give PyTorch's loss, weights and buffers; so does evaluation behind them.

    ``make`` gives what was exported to ``path``; ``draw`` a batch from a seed: with other data it is tried again, since
    rounding may move one value over a kink of ReLU, while a wrong gradient is wrong for any data. Allowed is
    `TOLERANCE` of how far a tensor moved (or of a hundredth of its magnitude, where it moved less), and `ROUNDINGS`
    times as much as PyTorch's float32 is off its own float64, which in deep networks is more.
    """
    bundle = Bundle.open(path)
    for attempt in range(ATTEMPTS):
        data = dict(draw(attempt))
        plain, exact = (_trained(make().to(dtype), bundle, data, loss) for dtype in (torch.float32, torch.float64))
        begin = {name: tensor.double().numpy() for name, tensor in make().state_dict().items()}
        found = _found(bundle, data)
        worst, name = max((_error(found[n], plain[n], exact[n], begin.get(n)), n) for n in found)
        if worst <= 1:
            return
    raise AssertionError(f"{name} is {worst:.1f} times as far off as allowed")


def _error(found: Any, plain: Any, exact: Any, begin: Any) -> float:
    """Of what is allowed."""
    moved = 0.0 if begin is None else _largest(exact - begin)
    floor = max(moved, 0.01 * _largest(exact)) if begin is not None else _largest(exact)
    return _largest(found - exact) / (TOLERANCE * max(floor, 1e-6) + ROUNDINGS * _largest(plain - exact))


def _hypers(bundle: Bundle) -> dict[str, float]:
    return bundle.manifest.defaults() | ({"mu": 0.1} if bundle.manifest.proximal else {})


def _control(bundle: Bundle) -> Any:
    control = np.sin(np.arange(bundle.layout.size)).astype(np.float32) * 0.01
    return control if bundle.manifest.control else None


def _found(bundle: Bundle, data: Numbers) -> Numbers:
    """Loss of the last step, weights, buffers, loss of evaluation."""
    source, trainer = ArraySource(data), Trainer(bundle)
    plan = TrainPlan(steps=STEPS, batch_size=source.samples, hypers=_hypers(bundle))
    result = trainer.train(bundle.initial(), source, plan, seed=SEED, control=_control(bundle))
    sums = trainer.evaluate(result.local, source, buffers=result.buffers)
    found: Numbers = {"training loss": result.loss, "evaluation loss": sums["loss"] / sums["count"]}
    tensors = bundle.layout.views(result.local) | bundle.manifest.layout("buffer").views(result.buffers)
    return {name: np.asarray(value, np.float64) for name, value in (found | tensors).items()}


def _trained(module: nn.Module, bundle: Bundle, data: Numbers, loss: LossFunction) -> Numbers:
    """The same of PyTorch, in the module's dtype."""
    hypers, control, source = _hypers(bundle), _control(bundle), ArraySource(data)
    controls = {} if control is None else bundle.layout.views(control)
    trained = {p.name for p in bundle.manifest.parameters if p.role == "trainable"}
    leaves = {name: p for name, p in module.named_parameters() if name in trained}
    begin = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    optimizer = make_optimizer(bundle.manifest.optimizer.name, list(leaves.values()), hypers)
    module.train()
    for step in range(STEPS):
        (batch,) = source.batches(source.samples, seed=_epoch_seed(SEED, step))
        optimizer.zero_grad()
        with DropoutMode(torch.tensor(_graph_seed(SEED)), torch.tensor(step + 1)):
            value = _loss(module, loss, batch, bundle)
        value.backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                leaf.grad += hypers.get("mu", 0.0) * (leaf.detach() - begin[name])
                leaf.grad += torch.tensor(controls[name]) if controls else 0.0
        if hypers.get("max_norm", 0.0) > 0:
            nn.utils.clip_grad_norm_(leaves.values(), hypers["max_norm"])
        optimizer.step()
    module.eval()
    with torch.no_grad():
        after = _loss(module, loss, data, bundle)
    found = {"training loss": value.detach(), "evaluation loss": after} | module.state_dict()
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def _loss(module: nn.Module, loss: LossFunction, batch: Mapping[str, Any], bundle: Bundle) -> Tensor:
    dtype = next(module.parameters()).dtype

    def tensors(features: Any) -> list[Tensor]:
        given = [torch.tensor(batch[feature.name]) for feature in features]
        return [x.to(dtype) if x.is_floating_point() else x for x in given]

    return loss(module(*tensors(bundle.manifest.inputs)), *tensors(bundle.manifest.targets))


def _largest(values: Any) -> float:
    return float(np.abs(values).max(initial=0))
