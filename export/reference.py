"""The steps that a training graph must reproduce, in plain PyTorch: autograd, `torch.optim`, gradient clipping."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export import modes
from export.dropout import DropoutMode
from export.step import Problem, slice_number
from export.updates import MAX_NORM, Tensors


@dataclass(frozen=True)
class Given:
    """What training starts from: trainable weights, buffers, the anchor, control variates, hyperparameters, a batch."""

    weights: Tensors
    buffers: Tensors
    anchors: Tensors
    controls: Tensors
    hypers: Mapping[str, float]
    batch: Tensors
    seed: int


@dataclass(frozen=True)
class Trained:
    """The loss of each step; weights, buffers and optimizer state (``slot.<slot>.<name>``) after the last."""

    losses: list[Tensor]
    weights: Tensors
    buffers: Tensors
    slots: Tensors


def train(problem: Problem, given: Given, steps: int, dtype: torch.dtype = torch.float32) -> Trained:
    """Make the steps on one batch, in ``dtype``; the module is in training mode and stays as it is."""
    weights, buffers, frozen, batch, anchors, controls = (
        in_dtype(tensors, dtype)
        for tensors in (given.weights, given.buffers, problem.frozen, given.batch, given.anchors, given.controls)
    )
    leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
    state = leaves | {n: t.clone() for n, t in buffers.items()} | frozen
    optimizer = make_optimizer(problem.optimizer.name, list(leaves.values()), given.hypers)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = _backward(problem, state, batch, given.seed, step + 1)
        for name, leaf in leaves.items():
            if leaf.grad is not None and problem.proximal:
                leaf.grad += given.hypers["mu"] * (leaf.detach() - anchors[name])
            if leaf.grad is not None and problem.control:
                leaf.grad += controls[name]
        if given.hypers.get(MAX_NORM, 0.0) > 0:
            torch.nn.utils.clip_grad_norm_(leaves.values(), given.hypers[MAX_NORM])
        optimizer.step()
        losses.append(loss.detach())
    slots = {}
    for name, leaf in leaves.items():
        for slot, tensor in _slots(optimizer.state[leaf], given.hypers).items():
            slots[f"slot.{slot}.{name}"] = tensor
        for slot in problem.optimizer.slots:
            slots.setdefault(f"slot.{slot}.{name}", torch.zeros_like(leaf))
    return Trained(
        losses, {n: leaf.detach() for n, leaf in leaves.items()}, {n: state[n] for n in given.buffers}, slots
    )


def _backward(problem: Problem, state: Tensors, batch: Tensors, seed: int, number: int) -> Tensor:
    """Add the gradients of a batch's mean loss to those of the leaves in ``state``; returns that loss."""
    size = len(next(iter(batch.values())))
    rows = problem.micro_batch or size
    parts = []
    for part, start in enumerate(range(0, size, rows)):
        cut = {n: t[start : start + rows] for n, t in batch.items()}
        with modes.reference(), DropoutMode(torch.tensor(seed), slice_number(torch.tensor(number), torch.tensor(part))):
            outputs = problem.forward(state, cut)
            loss = problem.loss.reference(*problem.arguments(outputs, cut))
        parts.append((loss, problem.rows(cut, outputs)))
    total = torch.stack([count for _, count in parts]).sum().clamp_min(torch.finfo(torch.float32).tiny)
    mean = torch.stack([loss * (count / total) for loss, count in parts]).sum()
    mean.backward()  # type: ignore[no-untyped-call]
    return mean


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    """Tensors of floats in ``dtype``, others as they are."""
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def make_optimizer(name: str, leaves: list[Tensor], hypers: Mapping[str, float]) -> torch.optim.Optimizer:
    """PyTorch's optimizer for one of `updates.UPDATES`."""
    lr, decay = hypers["lr"], hypers["weight_decay"]
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        betas = (hypers["beta1"], hypers["beta2"])
        return kind(leaves, lr=lr, betas=betas, eps=hypers["eps"], weight_decay=decay)
    momentum = 0.0 if name == "sgd" else hypers["momentum"]
    return torch.optim.SGD(leaves, lr=lr, momentum=momentum, weight_decay=decay, nesterov=name == "nesterov")


def _slots(state: Mapping[str, Tensor], hypers: Mapping[str, float]) -> Tensors:
    """The state in the units of `updates`."""
    if "momentum_buffer" in state:
        return {"momentum": state["momentum_buffer"] * hypers["lr"]}
    if "exp_avg" in state:
        return {
            "first_moment": state["exp_avg"] / (1 - hypers["beta1"]),
            "second_moment": state["exp_avg_sq"] / (1 - hypers["beta2"]),
        }
    return {}
