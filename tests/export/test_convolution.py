"""Formulations of convolution: each against PyTorch's autograd, and which layer takes which."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import choice
from export.choice import Choices
from export.columns import Columns
from export.depthwise import Depthwise
from export.direct import Direct
from export.formulation import Formulation, Layer
from export.pointwise import Pointwise
from export.taps import Taps
from export.winograd import MOST_POINTS, Winograd, axis
from tests.export.autograd import assert_gradients


def layer(
    inputs: int,
    outputs: int,
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Layer:
    n = len(sizes)
    results = tuple(
        (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s, k in zip(sizes, kernel, strict=True)
    )
    return Layer(inputs, outputs, sizes, results, kernel, (stride,) * n, (padding,) * n, (dilation,) * n, groups)


LAYERS = [
    layer(3, 8, (9, 11), (3, 3), padding=1),
    layer(16, 6, (9, 8), (3, 2)),
    layer(16, 5, (9, 8), (3, 3), stride=2, padding=1),
    layer(16, 5, (11, 10), (5, 5), stride=3, padding=2),
    layer(16, 20, (7, 5), (1, 1)),
    layer(16, 5, (9, 8), (1, 1), stride=2),
    layer(8, 8, (3, 3), (1, 1), stride=2, padding=1),
    layer(6, 4, (2, 5), (3, 3), stride=4, padding=3),
    layer(20, 6, (13, 12), (5, 5), padding=2),
    layer(16, 4, (14, 9), (7, 7), stride=2, padding=3),
    layer(16, 4, (9, 9), (3, 3), padding=2, dilation=2),
    layer(9, 16, (21,), (5,), padding=2),
    layer(32, 8, (20,), (3,), stride=2),
    layer(16, 4, (4, 6, 5), (3, 3, 3), padding=1),
    layer(8, 8, (9, 5), (3, 3), padding=1, groups=8),
    layer(8, 8, (10, 7), (5, 3), stride=2, padding=2, groups=8),
    layer(8, 8, (10, 7), (3, 3), padding=2, dilation=2, groups=8),
    layer(6, 6, (30,), (4,), stride=3, padding=1, groups=6),
    layer(8, 12, (6, 7), (3, 3), padding=1, groups=4),
]


def formulations(of: Layer) -> list[Formulation]:
    return [*Choices(False).candidates(of), *Choices(True).candidates(of)]


def run(of: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    function = [F.conv1d, F.conv2d, F.conv3d][len(of.sizes) - 1]
    return lambda x, w: function(x, w, None, of.stride, of.padding, of.dilation, of.groups)


@pytest.mark.parametrize("of", LAYERS, ids=str)
def test_every_formulation_agrees_with_pytorch(of: Layer) -> None:
    torch.manual_seed(3)
    x, w = torch.randn(4, of.inputs, *of.sizes), torch.randn(of.weight_shape)
    tried = set()
    for found in formulations(of):
        if repr(found) not in tried:
            tried.add(repr(found))
            assert_gradients(run(of), [x], {"w": w}, choose=lambda _, found=found: found, batches=(4, 1))
    assert len(tried) >= 2 or of.groups == 4


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (layer(64, 64, (25, 5), (1, 1)), Pointwise),
        (layer(1, 64, (49, 10), (10, 4), stride=2), Taps),
        (layer(64, 64, (25, 5), (3, 3), padding=1, groups=64), Depthwise),
        (layer(32, 64, (14, 14), (5, 5), padding=2), Winograd),
        (layer(16, 32, (32, 32), (3, 3), stride=2, padding=1), Winograd),
        (layer(32, 64, (100, 100), (3, 3), padding=1), Columns),
        (layer(16, 16, (14, 14), (3, 3), dilation=2), Columns),
        (layer(8, 12, (6, 7), (3, 3), groups=4), Direct),
    ],
)
def test_the_likely_fastest_comes_first(of: Layer, expected: type) -> None:
    assert isinstance(Choices()(of), expected)


def test_another_formulation_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layer(32, 64, (14, 14), (5, 5), padding=2)
    times = {"winograd": 10.0, "columns": 9.5, "direct": 20.0}
    monkeypatch.setattr(Choices, "_measured", lambda self, of, found: times[found.name])
    assert Choices(timed=True)(of).name == "winograd"
    times["columns"] = 8.0
    chooser = Choices(timed=True)
    assert chooser(of).name == "columns"
    assert chooser.made[of].milliseconds == times


def test_measurement_covers_every_candidate() -> None:
    of = layer(16, 32, (12, 12), (3, 3), padding=1)
    assert choice._work(of) >= choice.LEAST_WORK
    chooser = Choices(timed=True)
    chooser(of)
    assert set(chooser.made[of].milliseconds) == {"winograd", "columns", "direct"}
    assert all(value > 0 for value in chooser.made[of].milliseconds.values())


def test_small_layers_are_not_measured() -> None:
    chooser = Choices(timed=True)
    of = layer(16, 8, (4, 4), (3, 3), padding=1)
    chooser(of)
    assert chooser.made[of].milliseconds == {}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [2, 3, 5, 7])
def test_algorithms_have_few_points(taps: int, stride: int) -> None:
    found = axis(20, (20 - taps) // stride + 1, taps, stride, 0)
    assert found is not None
    assert max(len(range(q, taps, stride)) for q in range(stride)) <= MOST_POINTS
    outputs = (20 - taps) // stride + 1
    assert found.points * found.tiles <= outputs * taps


def test_no_algorithm_for_long_kernels() -> None:
    assert axis(40, 30, 11, 1, 0) is None
    assert not Winograd.suits(layer(16, 4, (40,), (11,)))


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "extra"),
    [
        ((16, 6, 5), (16, 20, 3, 3), 2, 1, 1),
        ((4, 6, 5), (4, 6, 3, 3), 1, 1, 0),
        ((16, 5, 5), (16, 8, 2, 2), 2, 0, 0),
        ((2, 5, 5), (2, 3, 4, 4), 2, 1, 0),
        ((16, 5, 5), (16, 8, 2, 2), 3, 0, 2),
    ],
)
def test_transposed_convolution_takes_the_same_formulations(
    shape: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int, extra: int
) -> None:
    ops = assert_gradients(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride, padding, extra),
        [torch.randn(4, *shape)],
        {"w": torch.randn(weight), "b": torch.randn(weight[1])},
    )
    assert not {"Conv", "ConvTranspose"} & ops


def test_no_transposes_remain_between_layers_of_one_layout() -> None:
    body = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    weights = dict(body.named_parameters())

    def residual(x: Tensor, **parameters: Tensor) -> Tensor:
        given = {name.replace("_", ".", 1): value for name, value in parameters.items()}
        y = torch.relu(torch.func.functional_call(body, given, (x,)) + x)
        return y.mean((2, 3))

    fixed = {name.replace(".", "_", 1): value.detach().clone() for name, value in weights.items()}
    counted: dict[str, int] = {}
    assert_gradients(residual, [torch.randn(4, 16, 8, 8)], fixed, module=body, counted=counted)
    # In and out of the layout, and the flags of the products; without pushing there are over thirty.
    assert counted["Transpose"] <= 8
