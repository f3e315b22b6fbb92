"""What verification tries: batches of several kinds, settings that switch everything on and off, a trained model."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_client.manifest import Feature
from export import reference
from export.step import Problem
from export.updates import MAX_NORM, Tensors

KINDS = ("random", "zero", "constant", "rounded")

Arrays = dict[str, npt.NDArray[np.generic]]


def given_for(problem: Problem, data: Arrays, case: int) -> reference.Given:
    """Both sides, over the cases, of everything that zero switches off."""
    weights = {n: t.clone() for n, t in problem.trainable.items()}
    chosen = {
        "lr": 0.01 if problem.optimizer.name in ("adam", "adamw") else 0.05,
        "momentum": 0.9,
        "beta1": 0.9,
        "beta2": 0.99,
        # Smaller ones blow up the rounding errors of gradients that are zero but for those.
        "eps": 1e-2,
        "weight_decay": (0.0, 0.02)[case % 2],
        "mu": (0.1, 0.0, 0.1)[case % 3],
        MAX_NORM: (0.05, 0.0, 1e3, 0.5)[case % 4],
    }
    signs = {
        n: (torch.arange(t.numel()).reshape(t.shape) % 3 - 1.0) * 0.01 * (case // 2 % 2) for n, t in weights.items()
    }
    return reference.Given(
        weights=weights,
        buffers={n: t.clone() for n, t in problem.buffers.items()},
        anchors={n: t * 0.9 for n, t in weights.items()} if problem.proximal else {},
        controls=signs if problem.control else {},
        hypers={hyper.name: chosen[hyper.name] for hyper in problem.hypers},
        batch={n: torch.from_numpy(a) for n, a in data.items()},
        seed=case,
    )


def largest_index(module: nn.Module) -> int:
    """Codes below this fit every embedding."""
    return min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=2)


def draw_batch(problem: Problem, size: int, kind: str, limit: int, generator: np.random.Generator) -> Arrays:
    """Inputs of a ``kind`` and targets of any, ``size`` rows; codes are below ``limit``."""

    def integers(shape: tuple[int, ...], high: int) -> npt.NDArray[np.generic]:
        top = {"random": high, "zero": 1, "constant": high, "rounded": min(high, 3)}[kind]
        values = generator.integers(0, top, shape)
        return np.full(shape, high // 2) if kind == "constant" else values

    def floats(shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
        if kind in ("zero", "constant"):
            return np.full(shape, 0.0 if kind == "zero" else generator.uniform(0.5, 1), np.float32)
        values = generator.standard_normal(shape)
        return (np.round(values) / 2 if kind == "rounded" else values).astype(np.float32)

    batch = {}
    for feature in problem.inputs:
        shape = (size, *feature.shape)
        batch[feature.name] = floats(shape) if feature.dtype == "float32" else integers(shape, limit)
    for feature in problem.targets:
        shape = (size, *feature.shape)
        if feature.dtype == "int64":
            batch[feature.name] = generator.integers(0, _classes(problem, feature), shape)
        else:
            batch[feature.name] = generator.integers(0, 2, shape).astype(np.float32)
    return batch


def _classes(problem: Problem, target: Feature) -> int:
    shape = problem.outputs[0].shape
    return shape[-1] if len(shape) == len(target.shape) + 1 else 2


def moved_model(problem: Problem) -> Tensors:
    """A model as training may leave it: what begins with zeros (adapters, running means) has other values."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator) * 0.05

    weights = {n: t + noise(t) if not t.any() else t for n, t in problem.trainable.items()}
    buffers = {n: t + noise(t) if t.is_floating_point() else t for n, t in problem.buffers.items()}
    return weights | buffers | problem.frozen
