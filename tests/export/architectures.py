"""Published networks for images, rebuilt from their papers; nobody wrote them with this export in mind."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
)  # fmt: skip
"""Expansion, channels, repetitions, stride: table 2 of the paper."""


def normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias that keeps the size at stride 1, and its batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """``act(body(x) + skip(x))``."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip, self.act = body, skip or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.body(x) + self.skip(x))
        return result


def inverted(inputs: int, outputs: int, expansion: int, stride: int) -> nn.Module:
    """An inverted residual with a linear bottleneck."""
    hidden = inputs * expansion
    widen = [*normed(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
    body = nn.Sequential(
        *widen, *normed(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *normed(hidden, outputs, 1)
    )
    return Residual(body) if stride == 1 and inputs == outputs else body


def mobilenet_v2(classes: int = 10) -> nn.Module:
    """Sandler et al. 2018, arXiv 1801.04381, width 1."""
    layers: list[nn.Module] = [*normed(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    for expansion, outputs, repetitions, stride in MOBILENET_V2:
        for i in range(repetitions):
            layers.append(inverted(channels, outputs, expansion, stride if i == 0 else 1))
            channels = outputs
    layers += [*normed(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(1280, classes))


def resnet18(classes: int = 10) -> nn.Module:
    """He et al. 2015, arXiv 1512.03385, table 1; projections (option B) where sizes change."""
    layers: list[nn.Module] = [*normed(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for outputs, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first, 1):
            body = nn.Sequential(
                *normed(channels, outputs, 3, stride), nn.ReLU(inplace=True), *normed(outputs, outputs, 3)
            )
            skip = None if channels == outputs else nn.Sequential(*normed(channels, outputs, 1, stride))
            layers.append(Residual(body, skip, nn.ReLU(inplace=True)))
            channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2020, arXiv 2010.11929; by default as DeiT-tiny (Touvron et al. 2020, arXiv 2012.12877)."""

    def __init__(
        self, image: int = 224, classes: int = 1000, *, patch: int = 16, d: int = 192, depth: int = 12
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, d) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, d // 64, 4 * d, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


class Excited(nn.Module):
    """Squeeze and excitation (Hu et al. 2017, arXiv 1709.01507)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * scale


def efficientnet(classes: int = 10) -> nn.Module:
    """MBConv stages of EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946), the first five, each block once."""

    def block(inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> nn.Module:
        hidden = inputs * expansion
        widen = [*normed(inputs, hidden, 1), nn.SiLU()] if expansion > 1 else []
        middle = [*normed(hidden, hidden, kernel, stride, hidden), nn.SiLU(), Excited(hidden, max(1, inputs // 4))]
        body = nn.Sequential(*widen, *middle, *normed(hidden, outputs, 1))
        return Residual(body) if stride == 1 and inputs == outputs else body

    return nn.Sequential(
        *normed(3, 32, 3, 2), nn.SiLU(),
        block(32, 16, 1, 3, 1), block(16, 24, 6, 3, 2), block(24, 24, 6, 3, 1), block(24, 40, 6, 5, 2),
        block(40, 80, 6, 3, 2), block(80, 112, 6, 5, 1), *normed(112, 320, 1), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(320, classes),
    )  # fmt: skip


class Shuffle(nn.Module):
    """A unit of ShuffleNet V2 (Ma et al. 2018, arXiv 1807.11164): stride 1 on half of the channels, or stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        given = inputs if stride == 2 else half
        self.right = nn.Sequential(
            *normed(given, half, 1), nn.ReLU(), *normed(half, half, 3, stride, half), *normed(half, half, 1), nn.ReLU()
        )
        self.left = (
            nn.Sequential(*normed(inputs, inputs, 3, 2, inputs), *normed(inputs, half, 1), nn.ReLU())
            if stride == 2
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, 1)
        x = torch.cat([self.left(left), self.right(right)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet(classes: int = 10) -> nn.Module:
    """Two short stages of ShuffleNet V2 0.5x."""
    return nn.Sequential(
        *normed(3, 24, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Shuffle(24, 48, 2), Shuffle(48, 48, 1), Shuffle(48, 96, 2), Shuffle(96, 96, 1),
        *normed(96, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes),
    )  # fmt: skip


class Fire(nn.Module):
    """SqueezeNet's module (Iandola et al. 2016, arXiv 1602.07360)."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.one, self.three = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


def squeezenet(classes: int = 10) -> nn.Module:
    """SqueezeNet 1.1 without its last two modules."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(64, 16, 64), Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True), Fire(128, 32, 128), Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True), Fire(256, 48, 192), Fire(384, 48, 192),
        nn.Dropout(0.5), nn.Conv2d(384, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015, arXiv 1505.04597, narrow, by bilinear upsampling: scores of every pixel, last axis."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(*normed(inputs, outputs, 3), nn.ReLU(), *normed(outputs, outputs, 3), nn.ReLU())

        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(double(i, o) for i, o in zip([1, *widths], widths, strict=False))
        self.bottom = double(4 * width, 4 * width)
        self.up = nn.ModuleList(
            double(i, o) for i, o in ((8 * width, 2 * width), (4 * width, width), (2 * width, width))
        )
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(torch.cat([skip, self.grow(x)], 1))
        result: Tensor = self.head(x).permute(0, 2, 3, 1)
        return result


class ConvNextBlock(nn.Module):
    """Liu et al. 2022, arXiv 2201.03545: depthwise 7x7, then channels last with layer scale."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(d, d, 7, padding=3, groups=d)
        self.norm, self.up, self.down = nn.LayerNorm(d, eps=1e-6), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.scale = nn.Parameter(torch.full((d,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext(classes: int = 10) -> nn.Module:
    """ConvNeXt of two stages."""
    return nn.Sequential(
        nn.Conv2d(3, 40, 4, 4), nn.GroupNorm(1, 40), ConvNextBlock(40), ConvNextBlock(40),
        nn.GroupNorm(1, 40), nn.Conv2d(40, 80, 2, 2), ConvNextBlock(80),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(80), nn.Linear(80, classes),
    )  # fmt: skip


class MobileViTBlock(nn.Module):
    """Mehta and Rastegari 2021, arXiv 2110.02178: a transformer over the pixels at one place of each 2x2 patch."""

    def __init__(self, channels: int, d: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(*normed(channels, channels, 3), nn.SiLU(), nn.Conv2d(channels, d, 1, bias=False))
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, 0.1, F.silu, batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.back = nn.Sequential(*normed(d, channels, 1), nn.SiLU())
        self.fuse = nn.Sequential(*normed(2 * channels, channels, 3), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        n, d, h, w = y.shape
        y = y.reshape(n, d, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(n * 4, h * w // 4, d)
        y = self.mix(y)
        y = y.reshape(n, 2, 2, h // 2, w // 2, d).permute(0, 5, 3, 1, 4, 2).reshape(n, d, h, w)
        result: Tensor = self.fuse(torch.cat([x, self.back(y)], 1))
        return result


def mobilevit(classes: int = 10) -> nn.Module:
    """Two inverted residuals and one block of MobileViT-XXS."""
    return nn.Sequential(
        *normed(3, 16, 3, 2), nn.SiLU(), inverted(16, 24, 2, 2), inverted(24, 48, 2, 2), MobileViTBlock(48, 64),
        *normed(48, 160, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, classes),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """Strided convolutions to a code of 16 numbers and transposed ones back (Radford et al. 2015, DCGAN)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(32 * 49, 16), nn.Linear(16, 32 * 49), nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def densenet(classes: int = 10) -> nn.Module:
    """One block and transition of DenseNet (Huang et al. 2016, arXiv 1608.06993), growth 12."""

    class Dense(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            body = [nn.BatchNorm2d(inputs), nn.ReLU(), *normed(inputs, 48, 1), nn.ReLU()]
            self.body = nn.Sequential(*body, nn.Conv2d(48, 12, 3, padding=1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.body(x)], 1)

    return nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1, bias=False), Dense(24), Dense(36), Dense(48), nn.BatchNorm2d(60), nn.ReLU(),
        nn.Conv2d(60, 30, 1, bias=False), nn.AvgPool2d(2), Dense(30), nn.BatchNorm2d(42), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(42, classes),
    )  # fmt: skip
