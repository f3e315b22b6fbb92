"""Plain convolution, pooling and embedding held to PyTorch's autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.export.autograd import assert_gradients


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def test_convolution() -> None:
    fixed = {"w": torch.randn(3, 2, 3, 3), "b": torch.randn(3)}
    assert_gradients(lambda x, w, b: F.conv2d(x, w, b, padding=1, stride=2), [torch.randn(4, 2, 7, 5)], fixed)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2)])
def test_pooling_with_ties(kernel: int, stride: int) -> None:
    x = torch.randn(4, 2, 6, 8).round()
    assert_gradients(lambda x: F.max_pool2d(x, kernel, stride), [x])
    assert_gradients(lambda x: F.avg_pool2d(x, kernel, stride), [x])


def test_embedding_with_padding() -> None:
    def function(i: Tensor, w: Tensor) -> Tensor:
        return F.embedding(i, w, padding_idx=1)

    assert_gradients(function, [torch.randint(0, 5, (4, 6))], {"w": torch.randn(5, 3)})
