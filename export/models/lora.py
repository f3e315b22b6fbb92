"""A small GPT to be tuned by low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

from torch import nn

from export.lora import Lora, add_adapters
from export.models.transformer import CharacterTransformer


def gpt_lora() -> nn.Module:
    """Four frozen layers of width 128, 4 heads, with adapters of rank 8: ``[N, 64] int64`` -> ``[N, 64, 80]`` logits.

    Of 887,632 parameters the adapters' 65,536 train.
    """
    base = CharacterTransformer(layers=4, width=128, heads=4, vocabulary=80, length=64)
    adapted, trained = add_adapters(base, Lora(rank=8, alpha=16.0, targets=("blocks.*",)))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name in trained)
    return adapted
