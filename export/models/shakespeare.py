"""A recurrent model of characters, of the kind that McMahan et al. 2017 (arXiv 1602.05629) train on Shakespeare."""

import torch
from torch import Tensor, nn


class CharacterModel(nn.Module):
    """Embedding, one GRU layer, linear read-out: ``[N, T] int64`` -> next-character logits ``[N, T, vocabulary]``.

    The graphs run the T steps that they are exported for.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T] int64`` -> ``[N, T, vocabulary] float32``."""
        start = torch.zeros((1, x.shape[0], self.gru.hidden_size))
        states, _ = self.gru(self.embedding(x), start)
        logits: Tensor = self.head(states)
        return logits


def char_gru(vocabulary: int = 80, embedding: int = 8, hidden: int = 128) -> nn.Module:
    """The model with its sizes; 80 characters hold Tiny Shakespeare's 65."""
    return CharacterModel(vocabulary, embedding, hidden)
