"""Sliding windows: outputs and gradients against PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.export.autograd import assert_gradients


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (nn.Unfold(3), (1, 7, 6)),
        (nn.Unfold(2, padding=1, stride=2), (3, 7, 6)),
        (nn.Unfold((2, 3), padding=(0, 1), stride=(1, 2), dilation=(2, 1)), (3, 7, 6)),
        (nn.Fold((6, 5), 2, padding=1), (12, 42)),
        (nn.Fold((6, 5), (2, 3), padding=(1, 0), stride=2, dilation=(1, 2)), (12, 4)),
        (lambda x: x.unfold(2, 3, 2), (3, 7)),
        (lambda x: x.unfold(1, 2, 3), (7, 3)),
        (lambda x: x.unfold(-1, 3, 1), (2, 400)),
        (lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2), (3, 7, 5)),
    ],
)
def test_windows(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    torch.manual_seed(11)
    assert_gradients(function, [torch.randn(3, *shape)])
