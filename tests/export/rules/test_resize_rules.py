"""Interpolation, padding and rearrangement of grids: outputs and gradients against PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.errors import ExportError
from export.bundle import export_bundle
from export.separable import AxisMap
from tests.export.autograd import assert_gradients

IMAGE = (2, 7, 6)


def assert_grid(function: Callable[[Tensor], Tensor], *shape: int) -> set[str]:
    torch.manual_seed(11)
    return assert_gradients(function, [torch.randn(3, *shape)], batches=(3, 1))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"scale_factor": 2},
        {"size": (5, 11)},
        {"size": (1, 7)},
        {"scale_factor": (0.6, 1.5)},
        {"scale_factor": (0.6, 1.5), "recompute_scale_factor": True},
    ],
)
def test_images(mode: str, sizes: dict[str, Any]) -> None:
    for corners in (None,) if "nearest" in mode else (True, False):
        assert_grid(lambda x, c=corners: F.interpolate(x, mode=mode, align_corners=c, **sizes), *IMAGE)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear"])
@pytest.mark.parametrize("sizes", [{"scale_factor": 3}, {"size": 5}, {"scale_factor": 0.7}])
def test_signals(mode: str, sizes: dict[str, Any]) -> None:
    assert_grid(lambda x: F.interpolate(x, mode=mode, **sizes), 2, 7)


def test_long_signals_are_gathered() -> None:
    ops = assert_grid(lambda x: F.interpolate(x, size=2000, mode="linear", align_corners=True), 1, 700)
    assert "Gather" in ops
    assert "MatMul" not in ops
    assert "Gather" in assert_grid(lambda x: F.interpolate(x, scale_factor=2), 1, 700)


@pytest.mark.parametrize("mode", ["nearest", "trilinear", "area"])
def test_volumes(mode: str) -> None:
    assert_grid(lambda x: F.interpolate(x, (4, 6, 9), mode=mode), 2, 7, 3, 5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Upsample(scale_factor=2),
        nn.Upsample(size=(9, 3), mode="bilinear", align_corners=True),
        nn.UpsamplingBilinear2d(scale_factor=2),
        nn.PixelUnshuffle(2),
        nn.ZeroPad2d((1, 0, 2, 1)),
    ],
)
def test_layers(layer: nn.Module) -> None:
    assert_grid(layer, 2, 4, 6)


def test_antialiased() -> None:
    assert_grid(lambda x: F.interpolate(x, (5, 9), mode="bilinear", antialias=True), 2, 15, 6)
    assert_grid(lambda x: F.interpolate(x, (4, 3), mode="bicubic", antialias=True), 2, 15, 6)


def test_pixel_shuffle() -> None:
    assert_grid(nn.PixelShuffle(2), 8, 3, 4)


def test_an_axis_too_long_to_interpolate_names_another_way() -> None:
    with pytest.raises(ExportError, match=r"from 1500 to 9000 .* transposed convolution"):
        assert_grid(lambda x: F.interpolate(x, size=9000), 1, 1500)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("pads", "shape"), [((2, 1), (2, 7)), ((0, 3), (2, 700)), ((2, 1, 0, 3), IMAGE), ((2, 1, 0, 2, 1, 1), (2, 3, 4, 5))]
)
def test_padding(mode: str, pads: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert_grid(lambda x: F.pad(x, pads, mode=mode), *shape)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_negative_padding_crops(mode: str) -> None:
    assert_grid(lambda x: F.pad(x, (-2, 1, 2, -1), mode=mode), *IMAGE)


def test_padding_with_a_value() -> None:
    assert_grid(lambda x: F.pad(x, (2, 1, 0, 1), value=2.5), *IMAGE)


def test_roll_and_flip() -> None:
    assert_grid(lambda x: torch.roll(x, (1, -2, 9), (1, 2, 3)), *IMAGE)
    assert_grid(lambda x: torch.roll(x, 7, -2), *IMAGE)
    assert_grid(lambda x: x.flip(-1, 1), *IMAGE)
    with pytest.raises(ExportError, match="give it dims="):
        assert_grid(lambda x: torch.roll(x, 1), *IMAGE)


def test_a_slice_of_the_whole_batch() -> None:
    assert_grid(lambda x: x[:, 0] + x[:, -1], *IMAGE)


@pytest.mark.parametrize("copies", [False, True])
def test_both_forms_of_a_map_and_its_transpose_are_one_matrix(copies: bool) -> None:
    generator = np.random.default_rng(3)
    matrix = generator.standard_normal((6, 4)) * (generator.random((6, 4)) < 0.4)
    matrix[2] = 0
    found = AxisMap.of_places(4, np.array([3, 3, 0, 1, 0, 2])) if copies else AxisMap.of_dense(matrix)
    if copies:
        matrix = np.eye(4)[[3, 3, 0, 1, 0, 2]]
    assert np.array_equal(found.dense("float64"), matrix)
    assert np.array_equal(found.transposed().dense("float64"), matrix.T)


class Decoder(nn.Module):
    """A small U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, padding_mode="replicate")
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.relu(self.first(x))
        low = torch.relu(self.second(high))
        up = F.interpolate(low, size=high.shape[2:], mode="bilinear")
        x = torch.relu(self.third(torch.cat([high, up], 1)))
        x = F.interpolate(self.last(self.shuffle(x)), scale_factor=0.5)
        return x.permute(0, 2, 3, 1)


def test_a_net_of_them_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(7)
    report = export_bundle(Decoder(), tmp_path / "u.fedge", name="u", inputs=[((1, 9, 8), "float32")])
    assert report.parity.worst_relative_error <= report.parity.tolerance
    assert report.manifest.outputs[0].shape == (9, 8, 2)
