"""The two image models of McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data" (arXiv 1602.05629). Both take ``[N, 1, 28, 28] float32`` in 0..1 and return ``[N, 10]`` logits."""

from torch import nn


def mnist_2nn() -> nn.Module:
    """Two hidden layers of 200 units with ReLU: 199,210 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def mnist_cnn() -> nn.Module:
    """Two 5x5 convolutions (32 and 64 channels), each with 2x2 max pooling, and 512 hidden units: 1,663,370 parameters.

    ReLU comes after the pooling: the same function, on a quarter of the values.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
