"""Residual networks: He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385)."""

from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride=stride)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] float32`` -> ``[N, width, H / stride, W / stride]``."""
        result: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return result


def resnet8() -> nn.Module:
    """ResNet-8 of MLPerf Tiny (arXiv 2106.07597) for CIFAR-10: ``[N, 3, 32, 32] float32`` -> ``[N, 10]`` logits.

    77,946 parameters.
    """
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
