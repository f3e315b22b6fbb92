"""Elementwise operators, products of matrices and reductions held to PyTorch's autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from export.alternatives import nearest
from export.bundle import RULES
from tests.export.autograd import assert_gradients

TIED = torch.tensor([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0], [-1.0, 0.0, 0.0, -1.0], [2.0, 1.0, 0.0, 2.0]])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def cube() -> Tensor:
    return torch.randn(4, 5, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sin() * x.cos() + x.atan() - x.sinh() / x.cosh() + x.asinh(),
        lambda x: (x / 9).tan() + (x / 9).asin() + (x / 9).acos() + (x / 9).atanh() + (x.abs() + 1.5).acosh(),
        lambda x: x.exp2() + x.expm1() + x.abs().log1p() + (x.abs() + 0.1).log2() + (x.abs() + 0.1).log10(),
        lambda x: x.erf() + x.erfc() + torch.logaddexp(x, 2 * x) + torch.hypot(x, x + 1),
        lambda x: x.floor() * x + x.ceil() + x.round() * x + x.trunc() * x + x.sign() * x,
        lambda x: torch.ops.aten.sgn(x.detach()) * x,
        lambda x: x**3 + x**1 + 2**x + x.square(),
        lambda x: (x.abs() + 0.1) ** 0.5 + (x.abs() + 0.1) ** -0.5 + (x.abs() + 0.1) ** -1 + (x.abs() + 0.1) ** 1.7,
        lambda x: (x.abs() + 0.1) ** x + (x.abs() + 0.1).rsqrt() + (x.abs() + 0.1).reciprocal(),
        lambda x: 1 - x + 2 / (x.abs() + 1) - torch.sub(x, x.exp(), alpha=0.5),
        lambda x: x.remainder(0.7) + x.fmod(0.7),
        lambda x: torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc") + x,
        lambda x: torch.addcmul(x, x, x, value=0.5) + torch.addcdiv(x, x, x.abs() + 1) + torch.lerp(x, 2 * x, 0.3),
        lambda x: torch.clamp(x, torch.zeros(3), torch.ones(3)) + x.clamp(max=torch.ones(3)),
        lambda x: torch.clamp_min(x, 0.3) + torch.clamp_max(x, 0.2) + (x * 1).clamp_min_(0.1) + (x * 1).clamp_max_(0.1),
        lambda x: torch.where((x > 0) & (x < 1) | (x >= 2) | ~(x <= 3), x, -x),
        lambda x: torch.where(torch.logical_xor(x > 0, x > 1), x, 0.0) + ((x > 0) ^ (x > 1)) * x,
        lambda x: torch.logical_and(x > 0, x > 1) * x + torch.logical_or(x > 0, x != 1) * x + (x == 1).logical_not(),
        lambda x: ((x > 0) * (x < 1)) * x + ((x > 0) + (x < 1)) * x,
        lambda x: x.masked_fill(x > 0, -1.0) * x.nan_to_num() + x.isinf() + x.isfinite(),
        lambda x: x * torch.arange(3) + torch.full((3,), 2.0) + torch.linspace(0, 1, 3) + torch.eye(5, 3),
        lambda x: x * torch.arange(x.shape[0])[:, None, None] + torch.full_like(x, 2) + torch.zeros_like(x),
        lambda x: x + x.new_zeros(3) + x.new_ones(3) + torch.ones_like(x) * torch.ones(x.shape[0], 1, 1),
        lambda x: x + torch.zeros(x.shape[0], 1, 1) + torch.scalar_tensor(2.0) + torch.maximum(x, -x),
        lambda x: torch.empty_like(x).fill_(2.0) * x + torch.empty(3).copy_(torch.ones(3)),
        lambda x: torch.ops.aten.reshape(x, [-1, 15]) * 2,
        lambda x: x.double().float() + x.to(torch.int64) + (x > 0).to(torch.int32),
    ],
)
def test_elementwise(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [cube()])


def test_integers_divide_as_in_torch() -> None:
    numbers = torch.tensor([[-7, -4, -1, 0], [1, 4, 7, 9]])
    assert_gradients(
        lambda x, n: x * (n // 3) + n % 3 + torch.div(n, 3, rounding_mode="trunc") - n / 4, [torch.randn(2, 4), numbers]
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.max(1),
        lambda x: x.min(1, keepdim=True),
        lambda x: x.max(1)[0] + x.min(1)[0],
        lambda x: x.max() + x.min(),
        lambda x: x.amax(1) + x.amin((1,)),
        lambda x: x.amax(1, keepdim=True) * x,
        lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(x, 1 - x),
        lambda x: x.argmax(1) + x.argmin(1) + x.sum(1),
        lambda x: x.argmax() + x + x.argmin(1, keepdim=True),
        lambda x: (x > 1).any(1) + x.sum(1) + (x > -1).all(),
    ],
)
def test_extrema_share_out_gradients_among_equals_as_torch_does(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [TIED])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum() + x.mean(),
        lambda x: x.sum(0) + x.mean((0, 2), keepdim=True),
        lambda x: x.var(1) + x.std((1,)),
        lambda x: x.var((1, 2), correction=0) + x.std((1, 2), correction=2),
        lambda x: torch.var_mean(x, 1, keepdim=True),
        lambda x: torch.var_mean(x),
        lambda x: x.norm() + x.norm(p=1),
        lambda x: x.norm(p=1, dim=1) + x.norm(dim=1) + x.norm(p=3, dim=1),
        lambda x: x.norm(p=float("inf"), dim=1) + x.norm(p=-float("inf"), dim=1) + x.detach().norm(p=0, dim=1),
        lambda x: torch.linalg.matrix_norm(x),
        lambda x: x.logsumexp(1) + x.logsumexp((1,)),
        lambda x: x.cumsum(1) ** 2 + x.cumsum(-1),
        lambda x: x.cumprod(1),
        lambda x: x.prod(1),
        lambda x: x.prod(2, keepdim=True) * x,
    ],
)
def test_reductions(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [cube()], batches=(4, 7))


def test_norms_of_zero_have_no_slope() -> None:
    assert_gradients(lambda x: x.norm(dim=1) + x.norm(p=1, dim=1), [torch.zeros(4, 3)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.einsum("bij,jk->bik", x, w),
        lambda x, w: torch.einsum("bij,bkj->bik", x, x),
        lambda x, w: torch.einsum("bij,ji->b", x, torch.cat([w, w, w[:, :1]], 1)),
        lambda x, w: torch.baddbmm(x @ w, x, w.expand(x.shape[0], -1, -1), beta=0.5, alpha=2.0),
        lambda x, w: x.mT @ x,
        lambda x, w: x @ w[:, 0],
        lambda x, w: x[:, 0] @ w + torch.addmm(w[0], x[:, 1], w, beta=2, alpha=0.5),
        lambda x, w: torch.ops.aten.t(x[:, 0] @ w).transpose(0, 1) * 2,
        lambda x, w: x.unsqueeze(1) @ torch.stack([w, -w]),
        lambda x, w: torch.outer(x[:, 0, 0], w[0]),
    ],
)
def test_products(function: Callable[..., Tensor]) -> None:
    assert_gradients(function, [cube()], {"w": torch.randn(3, 2)})


def test_the_nearest_alternative_is_of_the_same_family() -> None:
    assert nearest("aten.atan2", RULES) == "torch.atan of the quotient"
    assert nearest("aten.cumprod_", RULES) == "aten.cumprod"
    assert nearest("aten.special_bessel_j0", RULES) == ""
