"""Keyword spotting on microcontrollers: Zhang et al. 2017, "Hello Edge" (arXiv 1711.07128)."""

from torch import nn


def ds_cnn() -> nn.Module:
    """DS-CNN, size S: ``[N, 1, 49, 10] float32`` (49 frames of 10 MFCCs) -> ``[N, 12]`` logits; 23,180 parameters.

    A 10x4 convolution of stride 2, then four depthwise-separable 3x3 blocks of 64 channels. Convolutions have no bias:
    the normalization that follows would take it away again.
    """
    return nn.Sequential(
        nn.Conv2d(1, 64, (10, 4), stride=2, padding=(5, 1), bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *(_separable(64) for _ in range(4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 12),
    )


def _separable(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
