"""Activations held to PyTorch's autograd, with inputs at exactly 0 and at every kink."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.export.autograd import assert_gradients

KINKS = torch.tensor([-30.0, -6.0, -3.0, -1.0, -0.5, -0.0, 0.0, 1e-8, -1e-8, 0.5, 1.0, 2.5, 3.0, 6.0, 17.0, 30.0])


def points() -> Tensor:
    torch.manual_seed(5)
    around = torch.stack([KINKS, KINKS + 0.01, KINKS - 0.01, torch.randn(KINKS.shape) * 2])
    return torch.cat([around, torch.randn(1, len(KINKS))])


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.relu6,
        F.hardtanh,
        lambda x: F.hardtanh(x, -0.5, 3.0),
        F.leaky_relu,
        lambda x: F.leaky_relu(x, 0.3),
        F.elu,
        lambda x: F.elu(x, 0.7),
        F.selu,
        F.celu,
        lambda x: F.celu(x, 2.5),
        lambda x: torch.ops.aten.elu(x, 0.5, 1.5, 0.8),
        F.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        F.silu,
        F.mish,
        F.hardswish,
        F.hardsigmoid,
        F.softplus,
        lambda x: F.softplus(x, beta=2.5, threshold=3.0),
        lambda x: F.softplus(x, beta=0.5),
        F.logsigmoid,
        F.softsign,
        F.sigmoid,
        F.tanh,
        F.tanhshrink,
        F.hardshrink,
        lambda x: F.hardshrink(x, 1.0),
        F.softshrink,
        lambda x: F.softshrink(x, 3.0),
        lambda x: F.threshold(x, 1.0, -7.0),
        lambda x: F.threshold(x, 0.0, 2.0),
        lambda x: x.clamp(-0.5, 3.0),
        lambda x: x.clamp(min=1.0),
        lambda x: x.clamp(max=-1.0),
        torch.abs,
        lambda x: F.relu(x).pow(2),
        lambda x: F.softmax(x, -1),
        lambda x: F.log_softmax(x, 1),
        F.glu,
        lambda x: F.relu(x.clone(), inplace=True),
        lambda x: F.elu(x * 1, inplace=True),
        lambda x: F.hardswish(x * 1, inplace=True),
        lambda x: F.leaky_relu(x * 1, 0.1, inplace=True),
        lambda x: F.relu6(x * 1, inplace=True),
        lambda x: F.silu(x * 1, inplace=True),
    ],
)
def test_value_and_slope(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [points()])


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (2, 4, 2, 3)])
@pytest.mark.parametrize("channels", [1, 4])
def test_prelu_of_every_channel(shape: tuple[int, ...], channels: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[:4] = 0
    assert_gradients(lambda x, w: F.prelu(x, w), [x], {"w": torch.tensor([0.25, -0.5, 0.0, 2.0])[:channels]})


@pytest.mark.parametrize("dim", [1, 2, -2])
def test_softmax_over_any_axis(dim: int) -> None:
    x = torch.randn(3, 4, 5) * 10
    assert_gradients(lambda x: F.softmax(x, dim), [x])
    assert_gradients(lambda x: F.log_softmax(x, dim), [x])


def test_selections_are_products_with_a_mask() -> None:
    for function in (F.relu, F.relu6, F.leaky_relu, F.hardswish, F.elu):
        assert "Where" not in assert_gradients(function, [points()])
