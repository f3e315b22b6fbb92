"""Small models on images of 28 x 28, for trials of which there are many."""

from torch import nn

HIDDEN = 64


def perceptron() -> nn.Module:
    """One hidden layer of 64 units with ReLU: 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def normalized() -> nn.Module:
    """The same with batch normalization before the ReLU."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
