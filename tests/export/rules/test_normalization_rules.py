"""Normalisation held to PyTorch's autograd: any rank, affine or not, statistics of the batch or frozen."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def test_a_constant_input_has_no_infinite_gradient() -> None:
    assert_gradients(lambda x: F.batch_norm(x, None, None, training=True), [torch.full((4, 2, 3), 0.25)])
    assert_gradients(lambda x: F.layer_norm(x, [3]), [torch.full((4, 2, 3), 0.25)])
    assert_gradients(lambda x: F.normalize(x), [torch.zeros(4, 3)])


def test_parameters_that_need_no_gradient_get_none() -> None:
    layer = nn.BatchNorm2d(3).requires_grad_(False)
    assert "ReduceSum" not in assert_gradients(
        lambda x: F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias),
        [torch.randn(4, 3, 2, 2)],
    ) - {"ReduceSum"}
