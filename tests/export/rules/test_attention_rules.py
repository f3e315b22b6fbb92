"""Attention in all its forms, and what sequences are made of around it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.manifest import Feature
from export import modes
from export.bundle import export_bundle
from export.dropout import DropoutMode
from tests.export.autograd import assert_gradients

SEED, STEP = torch.tensor(3), torch.tensor(5)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n.replace(".", "__"): p.detach() for n, p in module.named_parameters()}


def called(module: nn.Module, given: dict[str, Tensor], *args: object, **named: object) -> Tensor:
    weights = {n.replace("__", "."): t for n, t in given.items()}
    with modes.reference():
        result: Tensor = torch.func.functional_call(module, weights, args, dict(named))
    return result


QKV = [torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4), torch.randn(3, 2, 7, 3)]


@pytest.mark.parametrize(
    ("mask", "scale"),
    [
        (None, None),
        (None, 0.3),
        (torch.rand(5, 7) > 0.3, None),
        (torch.randn(2, 5, 7), None),
        (torch.randn(5, 7).masked_fill(torch.rand(5, 7) > 0.7, -torch.inf), 2.0),
    ],
)
def test_scaled_dot_product_attention(mask: Tensor | None, scale: float | None) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    assert_gradients(function, QKV)


def test_a_mask_of_which_a_row_hides_everything_gives_zeros() -> None:
    hidden = torch.rand(3, 1, 5, 7) > 0.5
    hidden[:, :, 2] = False

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert_gradients(function, [*QKV, hidden])


@pytest.mark.parametrize("shape", [(4, 4), (5, 7), (7, 5), (1, 1)])
def test_causal_attention(shape: tuple[int, int]) -> None:
    q, k, v = torch.randn(2, shape[0], 4), torch.randn(2, shape[1], 4), torch.randn(2, shape[1], 4)
    assert_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v])


def test_a_learned_bias_gets_its_gradient() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    assert_gradients(function, QKV, {"bias": torch.randn(2, 5, 7)})


def test_heads_that_share_keys() -> None:
    q, k = torch.randn(3, 4, 5, 4), torch.randn(3, 2, 5, 4)
    assert_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), [q, k, k.flip(-1)])


def test_dropout_of_attention_weights() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        with DropoutMode(seed, step):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    assert_gradients(function, QKV, {"seed": SEED, "step": STEP})


PADDING = torch.tensor([[False, False, True, True, True], [False] * 5, [False, True, False, True, False]])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "bool", "float", "both"])
def test_self_attention(batch_first: bool, need_weights: bool, masked: str) -> None:
    module = nn.MultiheadAttention(6, 2, batch_first=batch_first)
    mask = {"bool": torch.ones(5, 5).triu(1) > 0, "both": torch.ones(5, 5).triu(1) > 0, "float": torch.randn(5, 5)}
    padded = masked in ("padding", "both")

    def function(x: Tensor, *rest: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        given = x if batch_first else x.transpose(0, 1)
        named = {"key_padding_mask": rest[0] if padded else None, "attn_mask": mask.get(masked)}
        result, seen = called(module, weights, given, given, given, need_weights=need_weights, **named)
        result = result if batch_first else result.transpose(0, 1)
        return (result, seen) if need_weights else (result,)

    assert_gradients(function, [torch.randn(3, 5, 6), *([PADDING] if padded else [])], parameters(module))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 3}, {"bias": False}])
def test_cross_attention(sizes: dict[str, int]) -> None:
    module = nn.MultiheadAttention(6, 3, batch_first=True, **sizes)
    key, value = torch.randn(3, 7, sizes.get("kdim", 6)), torch.randn(3, 7, sizes.get("vdim", 6))

    def function(q: Tensor, k: Tensor, v: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = called(module, weights, q, k, v, average_attn_weights=False)
        return result

    assert_gradients(function, [torch.randn(3, 5, 6), key, value], parameters(module))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mode", ["train", "eval", "dropout"])
def test_encoder_layer(norm_first: bool, activation: str, mode: str) -> None:
    layer = nn.TransformerEncoderLayer(
        6,
        2,
        10,
        dropout=0.3 if mode == "dropout" else 0.0,
        activation=activation,
        norm_first=norm_first,
        batch_first=True,
    )
    layer.train(mode != "eval")

    def function(x: Tensor, padding: Tensor, seed: Tensor, step: Tensor, **weights: Tensor) -> Tensor:
        with DropoutMode(seed, step):
            return called(layer, weights, x, src_key_padding_mask=padding)

    fixed = {"seed": SEED, "step": STEP} | parameters(layer)
    assert_gradients(function, [torch.randn(3, 5, 6), PADDING], fixed)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_with_causal_mask(training: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 10, 0.0, batch_first=True), 2, nn.LayerNorm(6))
    encoder.train(training)

    def function(x: Tensor, **weights: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return called(encoder, weights, x, mask=mask, is_causal=True)

    assert_gradients(function, [torch.randn(3, 5, 6)], parameters(encoder))


def test_decoder() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 10, 0.0, batch_first=True), 2)

    def function(x: Tensor, memory: Tensor, **weights: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return called(decoder, weights, x, memory, tgt_mask=mask)

    assert_gradients(function, [torch.randn(3, 5, 6), torch.randn(3, 4, 6)], parameters(decoder))


@pytest.mark.parametrize("hidden", [-torch.inf, -1e9])
def test_attention_written_by_hand(hidden: float) -> None:
    mask = torch.ones(5, 5).tril() == 0

    def function(x: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(mask, hidden), -1) @ v

    assert "Max" in assert_gradients(function, [torch.randn(3, 2, 5, 5) * 40, torch.randn(3, 2, 5, 4)])


def test_masked_scores_weigh_nothing_however_large_they_are() -> None:
    scores = torch.zeros(3, 4)
    scores[:, 2:] = 1e4
    q, k, v = scores.unsqueeze(1), torch.eye(4).expand(3, 4, 4), torch.randn(3, 4, 2)
    mask = torch.tensor([True, True, False, False])
    assert_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask.expand(1, 4), scale=1.0), [q, k, v])


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(function: Callable[[Tensor, int], Tensor], dim: int) -> None:
    fixed = {"x": torch.randn(3, 5, 7) * 3}
    assert_gradients(lambda _, x: function(x, dim), [torch.zeros(2, 1)], fixed)


def test_embedding_with_padding() -> None:
    indices = torch.tensor([[0, 3, 0], [4, 0, 1], [3, 3, 2]])
    assert_gradients(lambda i, table: F.embedding(i, table, padding_idx=0), [indices], {"table": torch.randn(5, 4)})


@pytest.mark.parametrize(
    "options", [{"mode": "sum"}, {}, {"mode": "max"}, {"padding_idx": 3}, {"mode": "sum", "padding_idx": 0}]
)
def test_embedding_bag(options: dict[str, Any]) -> None:
    indices = torch.tensor([[0, 3, 0], [4, 0, 1], [3, 3, 3]])
    assert_gradients(lambda i, table: F.embedding_bag(i, table, **options), [indices], {"table": torch.randn(5, 4)})


def test_weighted_embedding_bag() -> None:
    indices = torch.tensor([[0, 3, 0], [4, 0, 1], [3, 3, 3]])

    def function(i: Tensor, w: Tensor, *, table: Tensor) -> Tensor:
        return F.embedding_bag(i, table, mode="sum", per_sample_weights=w)

    assert_gradients(function, [indices, torch.randn(3, 3)], {"table": torch.randn(5, 4)})


class Language(nn.Module):
    """Tied weights, learned positions, a causal mask from the input's shape, padding from its values, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        logits: Tensor = self.head(self.encoder(hidden, mask=mask, src_key_padding_mask=x == 0))
        return logits


def test_language_model_with_tied_weights_and_masks(tmp_path: Path) -> None:
    report = export_bundle(Language(), tmp_path / "l.fedge", name="l", inputs=[((6,), "int64")], optimizer="momentum")
    assert "head.weight" not in {p.name for p in report.manifest.parameters}
    assert report.manifest.targets == (Feature("y", (6,), "int64"),)
