"""Functions that tracing replaces by others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.errors import ExportError
from tests.export.autograd import assert_gradients


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(3,), (6, 3), (2, 6, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(shape: tuple[int, ...], bias: bool) -> None:
    fixed = {"w": torch.randn(2, 3, 5)} | ({"c": torch.randn(2)} if bias else {})

    def function(a: Tensor, b: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
        return F.bilinear(a, b, w, c)

    assert_gradients(function, [torch.randn(4, *shape), torch.randn(4, *shape[:-1], 5)], fixed)


@pytest.mark.parametrize(
    ("shape", "places", "dim"), [((5,), (3,), 1), ((5, 2), (3, 1), 1), ((1, 5), (4, 2), 2), ((5, 3), (5, 2), -1)]
)
def test_take_along_dim(shape: tuple[int, ...], places: tuple[int, ...], dim: int) -> None:
    x = torch.randn(4, *shape)
    indices = torch.randint(0, x.shape[dim], (4, *places))
    assert_gradients(lambda x, i: torch.take_along_dim(x, i, dim), [x, indices])
    assert_gradients(lambda x, i: x.take_along_dim(i, dim=dim), [x], {"i": indices[:1]})


@pytest.mark.parametrize("function", [lambda x: torch.sgn(x) * x, lambda x: x.sgn() + x])
def test_signs(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [torch.round(torch.randn(4, 5))])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_distances(p: float) -> None:
    assert_gradients(lambda x, w: torch.cdist(x, w, p), [torch.randn(4, 3)], {"w": torch.randn(5, 3)})


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LPPool1d(2, 2), (2, 7)), (nn.LPPool1d(1, 3, 2, ceil_mode=True), (2, 8)),
        (nn.LPPool2d(2, (2, 3)), (2, 6, 7)),
        (nn.LPPool2d(3, 2, 1), (2, 5, 5)), (nn.LPPool3d(2, 2), (1, 4, 5, 4)),
    ],
)  # fmt: skip
def test_power_averages_of_windows_that_may_be_zero(layer: Any, shape: tuple[int, ...]) -> None:
    x = torch.relu(torch.randn(4, *shape) - 0.5)
    assert_gradients(layer, [x])
    assert_gradients(layer, [torch.zeros(4, *shape)])


def test_slopes_at_random_are_their_mean_in_evaluation_and_refused_in_training() -> None:
    assert_gradients(lambda x: F.rrelu(x, 0.1, 0.3), [torch.randn(4, 5)])
    with pytest.raises(ExportError, match=r"RReLU draws its slopes at random.*use nn\.LeakyReLU"):
        assert_gradients(lambda x: F.rrelu(x, training=True), [torch.randn(4, 5)])
