"""Indexing, shapes and sorting held to PyTorch's autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_client.errors import ExportError
from tests.export.autograd import assert_gradients

PLACES = torch.tensor([2, 0, 2, 1])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(2)


def cube() -> Tensor:
    return torch.randn(4, 5, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 1],
        lambda x: x[:, -2, 1:],
        lambda x: x[:, ::2],
        lambda x: x[:, 1:4:2, -1],
        lambda x: x[:, -3:-1],
        lambda x: x[:1] * x,
        lambda x: x[0] * x[-1],
        lambda x: x[:, :0].sum() + x,
        lambda x: x[:, None, :, 2],
        lambda x: x.narrow(2, 1, 2),
        lambda x: torch.stack([part * (i + 1) for i, part in enumerate(x.unbind(1))], 1),
        lambda x: x.chunk(2, 1)[1],
        lambda x: x.split(2, 1)[2],
        lambda x: torch.cat(x.split([2, 3], 1)[::-1], 1),
        lambda x: x.tensor_split(2, 1)[0],
        lambda x: x.repeat(1, 2, 1),
        lambda x: x.repeat(2, 1, 1, 2)[1],
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x[:, :1].expand(-1, 4, -1),
        lambda x: x.flip(1, 2),
        lambda x: x.roll(2, 1),
        lambda x: x.unfold(1, 3, 2),
        lambda x: x.diagonal(dim1=1, dim2=2),
        lambda x: x.diagonal(1, 1, 2),
        lambda x: x.diagonal(-2, 2, 1),
        lambda x: torch.diag_embed(x[:, 0]),
        lambda x: x.tril() + x.triu(1),
        lambda x: x.select_scatter(x[:, 0] * 2, 1, 2),
        lambda x: x.slice_scatter(x[:, :2] * 2, 1, 1, 3),
        lambda x: x.flatten(1).unflatten(1, (3, 5)).transpose(1, 2).contiguous(),
        lambda x: x.movedim(2, 1)[:, :1].squeeze(1).unsqueeze(-1),
        lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
        lambda x: F.pixel_shuffle(x.reshape(-1, 5, 3, 1).repeat(1, 4, 1, 1), 2),
        lambda x: F.channel_shuffle(x.repeat(1, 2, 1).unsqueeze(-1), 2),
    ],
)
def test_parts_and_shapes(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [cube()])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, PLACES],
        lambda x: x[:, [-1, -2], 1],
        lambda x: x[:, [0, 2, 4], [1, 0, 1]],
        lambda x: x[:, torch.tensor([[0], [4]]), torch.tensor([1, 0, 1])],
        lambda x: x.unsqueeze(1)[:, [0, 0, 0], :, [2, 1, 1]].transpose(0, 1),
        lambda x: x[torch.arange(x.shape[0]), torch.arange(x.shape[0]) % 5],
        lambda x: x.index_select(1, PLACES),
        lambda x: x.index_add(1, PLACES, x[:, :4]),
        lambda x: x.index_copy(1, torch.tensor([3, 1]), x[:, :2]),
        lambda x: x.index_fill(1, torch.tensor([3, 1]), 2.0),
        lambda x: x.index_put((torch.arange(x.shape[0])[:, None], PLACES[None]), torch.tensor(1.0), accumulate=True),
        lambda x: x.index_put((x > 0.5,), torch.tensor(2.0)),
        lambda x: torch.ops.aten._unsafe_index(x, [None, PLACES]),
    ],
)
def test_indices(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [cube()])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, i, s: x.gather(1, i),
        lambda x, i, s: x.scatter_add(1, i, s),
        lambda x, i, s: x.scatter_add(1, i[:, :1, :2], s.detach()),
        lambda x, i, s: x.scatter(1, i, 2.0),
        lambda x, i, s: x.scatter(1, i, s, reduce="add").detach() * x,
        lambda x, i, s: x.scatter_reduce(1, i, s, "sum"),
        lambda x, i, s: x.scatter_reduce(1, i, s, "amax"),
        lambda x, i, s: x.scatter(1, torch.tensor([[[0, 1, 2], [3, 4, 0]]]).expand(x.shape[0], -1, -1), s),
        lambda x, i, s: x * F.one_hot(i[:, 0], 5).transpose(1, 2),
    ],
)
def test_gathers_and_scatters(function: Callable[..., Tensor]) -> None:
    assert_gradients(function, [cube(), torch.randint(0, 5, (4, 2, 3)), torch.randn(4, 2, 3)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sort(1)[0],
        lambda x: x.sort(2, descending=True),
        lambda x: x.sort(dim=1, stable=True),
        lambda x: x.argsort(1) + x,
        lambda x: x.topk(2, 1),
        lambda x: x.topk(3, 1, largest=False)[0],
        lambda x: x.kthvalue(2, 1),
        lambda x: x.median(1, keepdim=True),
    ],
)
def test_order(function: Callable[[Tensor], Tensor]) -> None:
    assert_gradients(function, [cube()])


def test_equal_values_keep_their_order() -> None:
    tied = torch.tensor([[1.0, 2, 2, 0], [3, 3, 3, 3], [-1, 0, 0, -1]])
    assert_gradients(lambda x: x.sort(dim=1, stable=True), [tied])
    assert_gradients(lambda x: x.sort(dim=1, stable=True, descending=True), [tied])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:, torch.tensor([True, False, True, True, False])], r"use torch\.where or masked_fill"),
        (lambda x: x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, "mean"), "use sum, prod, amax"),
        (lambda x: x.as_strided((2, 2), (1, 1)), "aten.as_strided, which has no rule; .* slicing"),
    ],
)
def test_what_is_not_covered_names_an_alternative(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        assert_gradients(function, [cube()])


def test_writing_into_a_part_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1
        y[:, 0] = 0
        return y

    with pytest.raises(ExportError, match=r"writes into a part of a tensor .* use torch\.cat"):
        assert_gradients(function, [cube()])
