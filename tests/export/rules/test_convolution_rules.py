"""Convolutions of every geometry: outputs and gradients against PyTorch."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.bundle import export_bundle
from export.choice import Choices
from export.formulation import Formulation, Layer
from tests.export.autograd import assert_gradients


def assert_layer(layer: nn.Module, *shape: int) -> set[str]:
    torch.manual_seed(11)
    x = torch.randn(3, *shape)
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return assert_gradients(lambda x, **given: torch.func.functional_call(layer, given, (x,)), [x], weights)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(1, 4, 3), (1, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 11)),
        (nn.Conv1d(4, 6, 3, dilation=3, bias=False), (4, 11)),
        (nn.Conv1d(18, 6, 4, stride=3, padding=2, dilation=2), (18, 13)),
        (nn.Conv1d(4, 6, 4, padding="same"), (4, 11)),
        (nn.Conv2d(3, 5, (4, 2), padding="same", dilation=2), (3, 9, 8)),
        (nn.Conv2d(20, 5, (1, 4), padding="same"), (20, 5, 6)),
        (nn.Conv2d(4, 6, 1, stride=3, padding=2), (4, 5, 6)),
        (nn.Conv2d(18, 6, 2, stride=3, padding=4), (18, 5, 6)),
        (nn.Conv2d(4, 6, (5, 6)), (4, 5, 6)),
        (nn.Conv3d(3, 4, 3, stride=2, padding=1), (3, 7, 6, 5)),
        (nn.Conv3d(17, 4, 2, padding=1, dilation=2), (17, 5, 4, 6)),
        (nn.Conv3d(4, 4, (1, 2, 3), bias=False, padding=(0, 1, 2)), (4, 5, 4, 3)),
    ],
)
def test_one_group(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_layer(layer, *shape)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2, dilation=2), (4, 11)),
        (nn.Conv1d(6, 6, 1, groups=3), (6, 5)),
        (nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1), (4, 9, 8)),
        (nn.Conv2d(6, 4, (3, 2), groups=2, stride=(3, 2), padding=(1, 0), dilation=(2, 1), bias=False), (6, 13, 8)),
        (nn.Conv2d(4, 6, 2, padding=4, stride=3, groups=2), (4, 5, 6)),
        (nn.Conv2d(4, 12, 3, groups=4, padding=1), (4, 6, 7)),  # a depth multiplier of three
        (nn.Conv2d(4, 4, 3, groups=4, stride=2, dilation=2), (4, 9, 8)),
        (nn.Conv2d(4, 4, (5, 6), groups=4), (4, 5, 6)),
        (nn.Conv3d(4, 4, 3, groups=2, padding=1), (4, 5, 4, 3)),
        (nn.Conv3d(3, 6, 2, groups=3, stride=2), (3, 5, 4, 4)),
    ],
)
def test_groups(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert_layer(layer, *shape)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "settings", "shape"),
    [
        (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}, (7,)),
        (nn.ConvTranspose1d, {"kernel_size": 1, "stride": 3, "padding": 1, "output_padding": 2}, (4,)),
        (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (7, 5)),
        (nn.ConvTranspose2d, {"kernel_size": 2, "padding": 3}, (9, 8)),
        (
            nn.ConvTranspose2d,
            {"kernel_size": (3, 2), "stride": (3, 1), "padding": (1, 0), "output_padding": (2, 0), "bias": False},
            (5, 6),
        ),
        (nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2, "dilation": 2, "output_padding": 1}, (3, 2, 3)),
    ],
)
def test_transposed(kind: type[nn.Module], settings: dict[str, int], shape: tuple[int, ...], groups: int) -> None:
    assert_layer(kind(4, 8, groups=groups, **settings), 4, *shape)


def test_transposed_of_many_channels_and_of_one() -> None:
    assert_layer(nn.ConvTranspose2d(20, 24, 3, padding=1), 20, 7, 5)
    assert_layer(nn.ConvTranspose2d(1, 4, 3), 1, 5, 6)
    assert_layer(nn.ConvTranspose2d(4, 1, 3), 4, 5, 6)


@pytest.mark.parametrize("groups", [1, 2])
def test_output_padding_beyond_the_stride(groups: int) -> None:
    assert_layer(nn.ConvTranspose2d(2, 4, 3, dilation=2, output_padding=1, groups=groups), 2, 5, 6)
    assert_layer(nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, dilation=4, output_padding=3, groups=groups), 4, 5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(17, 20, 3, stride=2, padding=1), (17, 11)),
        (nn.Conv2d(16, 8, 3, padding=2), (16, 8, 7)),
        (nn.Conv2d(16, 20, 1), (16, 5, 6)),
        (nn.Conv2d(8, 8, (3, 5), padding=(0, 3), groups=8, stride=(2, 1)), (8, 9, 8)),
        (nn.ConvTranspose2d(20, 24, 3, padding=1), (20, 7, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, dilation=4, output_padding=3), (4, 5)),
    ],
)
def test_whatever_formulation_is_chosen(
    layer: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for place in itertools.count():

        def pick(choices: Choices, found: Layer, place: int = place) -> Formulation:
            candidates = choices.candidates(found)
            counts.append(len(candidates))
            return candidates[place]

        monkeypatch.setattr(Choices, "__call__", pick)
        assert_layer(layer, *shape)
        if place + 1 == counts[-1]:
            break
    assert counts[-1] > 1


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode: str) -> None:
    assert_layer(nn.Conv1d(4, 6, 3, padding=2, padding_mode=mode), 4, 11)
    assert_layer(nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode=mode), 4, 5, 6)
    if mode != "reflect":
        assert_layer(nn.Conv3d(2, 3, 3, padding=1, padding_mode=mode), 2, 3, 4, 3)


class Grouped(nn.Module):
    """A block in the manner of ShuffleNet, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(2, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 1, groups=4)
        self.shuffle = nn.ChannelShuffle(4)
        self.multiplied = nn.Conv2d(8, 16, 3, padding="same", dilation=2, groups=8)
        self.wide = nn.ConvTranspose2d(16, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.temporal = nn.Conv1d(4, 4, 4, padding="same", groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.narrow(x))
        x = torch.relu(self.multiplied(self.shuffle(self.grouped(x))))
        x = self.temporal(torch.relu(self.wide(x)).flatten(2))
        logits: Tensor = self.head(x.mean(-1))
        return logits


def test_a_net_of_them_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(7)
    report = export_bundle(Grouped(), tmp_path / "g.fedge", name="g", inputs=[((2, 10, 8), "float32")])
    assert report.parity.worst_relative_error <= report.parity.tolerance
