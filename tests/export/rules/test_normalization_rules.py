"""Normalisation held to PyTorch's autograd: any rank, affine or not, statistics of the batch or frozen."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client import runtime
from edge_client.manifest import Feature
from export.bundle import RULES
from export.choice import Choices
from export.lower import lower
from export.trace import trace
from tests.export.autograd import assert_gradients

SHAPES = [(5, 3), (4, 3, 7), (4, 2, 5, 3), (4, 3, 2, 3, 2)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def channels(shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"w": torch.randn(shape[1]), "b": torch.randn(shape[1])}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_by_statistics_of_the_batch(shape: tuple[int, ...], affine: bool) -> None:
    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, fixed.get("w"), fixed.get("b"), training=True)

    batches = (4, 7) if len(shape) == 2 else (4, 1, 7)
    ops = assert_gradients(function, [torch.randn(shape) * 3 + 2], channels(shape) if affine else {}, batches=batches)
    assert "Where" not in ops


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_batch_norm(shape: tuple[int, ...], affine: bool) -> None:
    # int64: statistics are no leaves, and the harness differentiates all floats.
    mean, var = torch.arange(shape[1]) - 1.0, torch.arange(shape[1]) + 0.5

    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, fixed.get("w"), fixed.get("b"), training=False)

    assert_gradients(function, [torch.randn(shape) * 2], channels(shape) if affine else {})


def test_statistics_far_from_zero_cost_no_precision() -> None:
    x = torch.randn(6, 4, 9) + torch.tensor([0.0, 30.0, -100.0, 300.0]).reshape(4, 1)
    assert_gradients(lambda x: F.batch_norm(x, None, None, training=True), [x], tolerance=2e-4)
    assert_gradients(lambda x: F.layer_norm(x, [9]), [x], tolerance=2e-4)


@pytest.mark.parametrize("shape", [(4, 3, 7), (3, 2, 5, 3), (2, 2, 3, 2, 3)])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(shape: tuple[int, ...], affine: bool) -> None:
    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, fixed.get("w"), fixed.get("b"))

    assert_gradients(function, [torch.randn(shape) + 1], channels(shape) if affine else {})


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_layer_norm(axes: int, affine: str) -> None:
    shape = (3, 4, 5, 3)
    normalized = shape[-axes:]
    fixed = {"w": torch.randn(normalized), "b": torch.randn(normalized)}
    given = {"both": fixed, "weight": {"w": fixed["w"]}, "none": {}}[affine]

    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.layer_norm(x, normalized, fixed.get("w"), fixed.get("b"))

    assert_gradients(function, [torch.randn(shape) * 2 - 1], given)


@pytest.mark.parametrize(("groups", "shape"), [(1, (3, 4, 5)), (2, (4, 6, 3, 5)), (6, (2, 6, 3, 1)), (3, (5, 12))])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(groups: int, shape: tuple[int, ...], affine: bool) -> None:
    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.group_norm(x, groups, fixed.get("w"), fixed.get("b"))

    assert_gradients(function, [torch.randn(shape) + 0.5], channels(shape) if affine else {})


@pytest.mark.parametrize("normalized", [(5,), (4, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(normalized: tuple[int, ...], affine: bool) -> None:
    def function(x: Tensor, **fixed: Tensor) -> Tensor:
        return F.rms_norm(x, normalized, fixed.get("w"), 1e-5)

    assert_gradients(function, [torch.randn(3, 4, 5)], {"w": torch.randn(normalized)} if affine else {})


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_normalize(p: float) -> None:
    assert_gradients(lambda x: F.normalize(x, p=p, dim=1), [torch.randn(4, 5, 3)])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm(dim: int) -> None:
    lengths = torch.ones([3 if axis == dim else 1 for axis in range(3)]) * 1.5

    def function(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return x @ torch._weight_norm(v, g, dim).flatten(1)

    assert_gradients(function, [torch.randn(4, 3)], {"v": torch.randn(3, 3, 3), "g": lengths})


def test_a_constant_input_has_no_infinite_gradient() -> None:
    assert_gradients(lambda x: F.batch_norm(x, None, None, training=True), [torch.full((4, 2, 3), 0.25)])
    assert_gradients(lambda x: F.layer_norm(x, [3]), [torch.full((4, 2, 3), 0.25)])
    assert_gradients(lambda x: F.normalize(x), [torch.zeros(4, 3)])


class Averages(nn.Module):
    """Batch normalisation that returns its statistics after the forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, statistics: dict[str, Tensor]) -> tuple[Tensor, ...]:
        state = {n: t.detach().clone() for n, t in statistics.items()}
        y = torch.func.functional_call(self.layer, state, (x,))
        return y, *(state[n].detach() for n in statistics)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (3, 3, 2, 4)])
def test_running_statistics(momentum: float | None, shape: tuple[int, ...]) -> None:
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3, momentum=momentum)
    module = Averages(layer.train())
    statistics = {"running_mean": torch.randn(3), "running_var": torch.rand(3), "num_batches_tracked": torch.tensor(4)}

    def function(x: Tensor, **statistics: Tensor) -> tuple[Tensor, ...]:
        y, mean, variance, count = module(x, statistics)
        return y, mean, variance, count

    assert_gradients(function, [torch.randn(shape) * 3 + 2], statistics, module=module, batches=(4, 7))
    assert layer.momentum == momentum


def test_a_single_value_changes_no_running_variance() -> None:
    module = Averages(nn.BatchNorm1d(3, affine=False).train())
    start = torch.tensor([1.0, 2.0, 3.0])

    def step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {"running_mean": torch.zeros(3), "running_var": tensors["var"], "num_batches_tracked": torch.tensor(1)}
        return dict(zip(("y", "mean", "var.next", "count"), module(tensors["x"], given), strict=True))

    traced = trace(step, {"var": start}, [Feature("x", (3,), "float32")], module)
    graph = lower(traced, RULES, Choices())
    session = runtime.session(graph.to_model("single"))
    y, variance = session.run(["y", "var.next"], {"x": np.full((1, 3), 5, np.float32), "var": start.numpy()})
    assert (y == 0).all()
    assert (variance == start.numpy()).all()
