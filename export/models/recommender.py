"""Matrix factorization for recommendations, whose user never leaves the phone."""

import torch
from torch import Tensor, nn

from export.models.ratings import ITEMS

PERSONAL = "user.*"
"""What stays on the phone."""


class User(nn.Module):
    """The one user of a phone: a vector of tastes, and how much more than others it likes anything."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(1, rank))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, items: Tensor) -> Tensor:
        """``[N, rank]`` -> ``[N, 1]``: how well each item fits the user."""
        return (items * self.vector).sum(1, keepdim=True) + self.bias


class Recommender(nn.Module):
    """Ratings as a mean, biases of user and item, and the product of their vectors (Koren et al. 2009, "Matrix
    Factorization Techniques for Recommender Systems"). Each phone has one user, so there is one user vector."""

    def __init__(self, items: int, rank: int, middle: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((1,), middle))
        self.items, self.biases, self.user = nn.Embedding(items, rank), nn.Embedding(items, 1), User(rank)
        nn.init.normal_(self.items.weight, std=0.5)
        nn.init.zeros_(self.biases.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1] int64``, the item -> ``[N, 1] float32``, its rating."""
        item = x[:, 0]
        rating: Tensor = self.mean + self.biases(item) + self.user(self.items(item))
        return rating


def recommender() -> nn.Module:
    """For `export.models.ratings.tastes`: ``[N, 1] int64`` -> ``[N, 1] float32``; 124 parameters, of which 3 stay."""
    return Recommender(ITEMS, 2, 3.0)
