"""Max, average and adaptive pooling: outputs and gradients against PyTorch, ties included."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.errors import ExportError
from export.bundle import export_bundle
from tests.export.autograd import assert_gradients


def assert_pooling(layer: nn.Module, *shape: int) -> None:
    torch.manual_seed(11)
    values = torch.randn(3, *shape)
    # Rows: random values, many ties, and nothing but ties.
    x = torch.cat([values, values.round() / 2, torch.zeros(1, *shape)])
    assert_gradients(layer, [x], batches=(7, 1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.MaxPool1d(2), (3, 8)),
        (nn.MaxPool1d(3, 2, 1), (3, 11)),
        (nn.MaxPool1d(2, 4, 1, ceil_mode=True), (2, 3)),  # a last window in the padding, which PyTorch leaves out
        (nn.MaxPool2d(2), (3, 6, 8)),
        (nn.MaxPool2d(2), (3, 7, 5)),
        (nn.MaxPool2d((3, 1)), (2, 6, 5)),
        (nn.MaxPool2d((2, 3), padding=1), (2, 7, 6)),
        (nn.MaxPool2d(3, ceil_mode=True), (2, 8, 7)),
        (nn.MaxPool2d(5), (2, 5, 5)),
        (nn.MaxPool2d(3, 2, 1), (3, 9, 8)),
        (nn.MaxPool2d(3, 1, 1, dilation=2), (3, 9, 8)),
        (nn.MaxPool2d(2, ceil_mode=True), (3, 9, 7)),
        (nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), (2, 9, 8)),
        (nn.MaxPool2d((1, 3), (5, 4), (0, 1), ceil_mode=True), (2, 9, 8)),
        (nn.MaxPool3d(2), (2, 4, 6, 2)),
        (nn.MaxPool3d(3, 2, 1, ceil_mode=True), (2, 5, 4, 6)),
        (nn.MaxPool3d(2, 2, 1, dilation=(1, 2, 1)), (2, 3, 5, 4)),
    ],
)
def test_max(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_pooling(layer, *shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AvgPool1d(2), (3, 8)),
        (nn.AvgPool1d(2, 3), (2, 10)),
        (nn.AvgPool1d(2, 4, 1, ceil_mode=True, count_include_pad=False), (2, 3)),
        (nn.AvgPool1d(60, 1, 30, count_include_pad=False), (1, 1000)),
        (nn.AvgPool2d(2), (3, 7, 8)),
        (nn.AvgPool2d(3, 2, 1), (3, 9, 8)),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (3, 10, 8)),
        (nn.AvgPool2d(2, 4, 1, ceil_mode=True), (2, 3, 5)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 9, 8)),
        (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (3, 10, 8)),
        (nn.AvgPool2d(3, 2, 1, divisor_override=2), (3, 9, 8)),
        (nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=5), (2, 6, 8)),
        (nn.AvgPool3d(2), (2, 5, 4, 6)),
        (nn.AvgPool3d(2, 4, 1, ceil_mode=True, count_include_pad=False), (2, 3, 5, 4)),
        (nn.AvgPool3d(2, 1, 1, divisor_override=3), (2, 3, 5, 4)),
    ],
)
def test_average(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_pooling(layer, *shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.AdaptiveAvgPool1d(1), (3, 7)),
        (nn.AdaptiveAvgPool1d(3), (3, 7)),
        (nn.AdaptiveAvgPool1d(7), (3, 3)),
        (nn.AdaptiveAvgPool1d(5), (3, 5)),
        (nn.AdaptiveAvgPool2d(1), (3, 7, 5)),
        (nn.AdaptiveAvgPool2d((3, 2)), (3, 7, 6)),
        (nn.AdaptiveAvgPool2d((None, 8)), (3, 7, 5)),
        (nn.AdaptiveAvgPool3d((2, 3, 5)), (3, 5, 4, 6)),
        (nn.AdaptiveMaxPool1d(1), (3, 7)),
        (nn.AdaptiveMaxPool1d(4), (3, 9)),
        (nn.AdaptiveMaxPool2d(1), (3, 7, 5)),
        (nn.AdaptiveMaxPool2d((3, 2)), (3, 6, 8)),
        (nn.AdaptiveMaxPool2d((3, 2)), (3, 7, 10)),
        (nn.AdaptiveMaxPool2d((7, 3)), (3, 3, 5)),
        (nn.AdaptiveMaxPool3d(2), (3, 3, 5, 4)),
    ],
)
def test_adaptive(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_pooling(layer, *shape)


def test_power_average() -> None:
    # Not where all of a window is zero: the gradient of the root is infinite there.
    for layer, shape in ((nn.LPPool1d(2, 3, 2), (2, 7)), (nn.LPPool2d(2, 3), (2, 7, 6))):
        assert_gradients(layer, [torch.randn(3, *shape)])


def test_the_indices_of_max_pooling_are_refused() -> None:
    def unpooled(x: Tensor) -> Tensor:
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)

    with pytest.raises(ExportError, match=r"indices of max-pooling.*nn\.Upsample"):
        assert_gradients(unpooled, [torch.randn(3, 2, 4, 6)])


def test_random_windows_are_refused() -> None:
    with pytest.raises(ExportError, match=r"fractional_max_pool2d.* random.*AdaptiveMaxPool2d"):
        assert_gradients(nn.FractionalMaxPool2d(2, output_size=3), [torch.randn(3, 2, 7, 8)])


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2)])
def test_images_without_channels_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ExportError, match=r"found 3 dimensions.*unsqueeze\(1\)"):
        assert_gradients(layer, [torch.randn(3, 4, 6)])


def test_a_net_of_them_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(7)
    module = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.AdaptiveMaxPool2d((5, 4)),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.Flatten(),
        nn.Linear(54, 3),
    )
    report = export_bundle(module, tmp_path / "p.fedge", name="p", inputs=[((2, 15, 13), "float32")])
    assert report.parity.worst_relative_error <= report.parity.tolerance
