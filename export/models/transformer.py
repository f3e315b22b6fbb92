"""Causal transformers over characters: Vaswani et al. 2017 (arXiv 1706.03762), normalized before each part as in GPT-2
(Radford et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention, then two linear layers with GELU; each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width] float32`` -> the same shape."""
        n, t, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, t, width))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class CharacterTransformer(nn.Module):
    """Token and learned position embeddings, blocks, linear read-out: next-character logits."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, length] int64`` -> ``[N, length, vocabulary] float32``."""
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.positions)))
        return logits


def char_transformer() -> nn.Module:
    """Two layers of width 128, 4 heads: ``[N, 64] int64`` (codes below 80) -> ``[N, 64, 80]`` logits.

    425,552 parameters.
    """
    return CharacterTransformer(layers=2, width=128, heads=4, vocabulary=80, length=64)
