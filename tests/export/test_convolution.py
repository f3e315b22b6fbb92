"""Convolutions of many shapes: the export's own parity check holds each form against PyTorch."""

import zipfile
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from export.bundle import Report, export_bundle


def exported(tmp_path: Path, shape: tuple[int, ...], *layers: nn.Module) -> Counter[str]:
    torch.manual_seed(7)
    module = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    report: Report = export_bundle(module, tmp_path / "c.fedge", name="c", inputs=[(shape, "float32")])
    with zipfile.ZipFile(report.path) as archive:
        return Counter(node.op_type for node in onnx.load_from_string(archive.read("train.onnx")).graph.node)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 6, 3, padding=1),
        nn.Conv2d(16, 6, (3, 2), stride=(2, 1), padding=(0, 1)),
        nn.Conv2d(16, 6, 3, stride=2, padding=2, dilation=2, bias=False),
        nn.Conv2d(16, 20, 1),
        nn.Conv2d(16, 5, 1, stride=2),
        nn.Conv2d(96, 4, 3),
    ],
)
def test_many_channels_go_by_columns(layer: nn.Conv2d, tmp_path: Path) -> None:
    ops = exported(tmp_path, (2, 9, 8), nn.Conv2d(2, layer.in_channels, 1), nn.ReLU(), layer)
    assert ops["Conv"] == 2  # the first layer and its weights' gradient
    assert ops["ConvTranspose"] == 1


@pytest.mark.parametrize(
    ("layer", "pool"),
    [
        (nn.Conv2d(1, 4, 5, padding=2), 2),
        (nn.Conv2d(3, 4, (3, 5), padding=(1, 2), bias=False), 2),
        (nn.Conv2d(2, 3, 5, stride=2, padding=1), (1, 2)),
        (nn.Conv2d(1, 3, 7, padding=3), 3),
    ],
)
def test_few_channels_before_pooling_come_as_slabs(
    layer: nn.Conv2d, pool: int | tuple[int, int], tmp_path: Path
) -> None:
    ops = exported(tmp_path, (layer.in_channels, 12, 18), layer, nn.MaxPool2d(pool), nn.ReLU())
    assert ops["Conv"] == 2
    assert ops["Split"] == 1


def test_slabs_reach_layers_before_them(tmp_path: Path) -> None:
    exported(tmp_path, (1, 12, 12), nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 5, padding=2), nn.MaxPool2d(2))


def test_a_convolution_read_twice_stays_whole(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pool = nn.Conv2d(1, 4, 5, padding=2), nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            return torch.cat([self.pool(x).flatten(1), x.flatten(1)], 1)

    assert exported(tmp_path, (1, 8, 8), Both())["Split"] == 0
