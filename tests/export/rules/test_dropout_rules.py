"""Dropout masks: the same bits in PyTorch and ONNX Runtime, and no structure that statistics would see."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.dropout import DropoutMode, keep
from tests.export.autograd import assert_gradients

SEED, STEP = torch.tensor(-(2**61) + 12345), torch.tensor(7)


def test_an_element_is_kept_or_zero_with_the_mean_preserved() -> None:
    x = torch.ones(64, 1000)
    with DropoutMode(SEED, STEP):
        y = F.dropout(x, 0.2)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert abs(float(y.mean()) - 1) < 0.01


@pytest.mark.parametrize("shape", [(6,), (5, 7), (3, 4, 5), (4, 3, 5, 2), (2, 3, 2, 2, 3)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_both_sides_draw_the_same_mask(shape: tuple[int, ...], p: float) -> None:
    def function(x: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        with DropoutMode(seed, step):
            return F.dropout(F.dropout(x, p) * 2 + x, p)

    assert_gradients(function, [torch.randn(shape)], {"seed": SEED, "step": STEP}, tolerance=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.3, inplace=True), (3, 4, 5)),
        (nn.Dropout1d(0.3), (3, 4, 5)),
        (nn.Dropout2d(0.4), (3, 4, 5, 2)),
        (nn.Dropout3d(0.4), (3, 4, 2, 5, 2)),
        (nn.AlphaDropout(0.3), (3, 9)),
        (nn.FeatureAlphaDropout(0.3), (3, 4, 5)),
    ],
)
def test_every_kind_of_dropout(layer: nn.Module, shape: tuple[int, ...]) -> None:
    def function(x: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        with DropoutMode(seed, step):
            result: Tensor = layer(x * 1.5)
        return result

    assert_gradients(function, [torch.randn(shape)], {"seed": SEED, "step": STEP})


@pytest.mark.parametrize("layer", [nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.FeatureAlphaDropout(0.5)])
def test_channels_are_dropped_whole(layer: nn.Module) -> None:
    x = torch.ones(8, 16, 5) if not isinstance(layer, nn.Dropout2d) else torch.ones(8, 16, 5, 3)
    with DropoutMode(SEED, STEP):
        y = layer(x).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y))
    assert len(y.unique()) == 2


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(500, 500, generator=torch.Generator().manual_seed(0))
    with DropoutMode(SEED, STEP):
        y = F.alpha_dropout(x, 0.3, training=True)
    assert abs(float(y.mean())) < 0.02
    assert abs(float(y.var()) - 1) < 0.02


def test_nothing_is_dropped_in_evaluation() -> None:
    x = torch.randn(3, 4)
    with DropoutMode(SEED, STEP) as mode:
        assert nn.Dropout(0.5).eval()(x) is x
        assert F.dropout(x, 0.0) is x
    assert mode.calls == 0


def mask(seed: int, step: int, call: int, shape: tuple[int, ...], p: float) -> np.ndarray:
    kept = keep(list(shape), torch.tensor(seed), torch.tensor(step), call, p, 1.0)
    return kept.numpy().astype(np.float64)


def test_masks_repeat_with_their_seed_and_a_row_does_not_depend_on_the_batch() -> None:
    assert np.array_equal(mask(3, 4, 5, (6, 7), 0.5), mask(3, 4, 5, (6, 7), 0.5))
    assert np.array_equal(mask(3, 4, 5, (6, 7), 0.5)[:2], mask(3, 4, 5, (2, 7), 0.5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_over_all_rows_columns_and_steps(p: float) -> None:
    masks = np.stack([mask(11, step, 1, (256, 256), p) for step in range(1, 17)])
    deviation = np.sqrt(p * (1 - p))
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:
        means = masks.mean(axes)
        count = masks.size // means.size
        scores = (means - (1 - p)) / (deviation / np.sqrt(count))
        # The largest of a few thousand standard normals stays below 4.5; their spread is one.
        assert np.abs(scores).max() < 4.5
        assert abs(scores.std() - 1) < 4.5 / np.sqrt(2 * scores.size)


@pytest.mark.parametrize("change", ["seed", "step", "call"])
def test_masks_of_neighbouring_seeds_steps_and_calls_are_independent(change: str) -> None:
    base = {"seed": 5, "step": 1, "call": 1}
    masks = [mask(**(base | {change: i}), shape=(128, 128), p=0.5).ravel() - 0.5 for i in range(1, 13)]
    for first, second in itertools.combinations(masks, 2):
        correlation = 4 * float(first @ second) / first.size
        assert abs(correlation) < 4.5 / np.sqrt(first.size)


def test_elements_of_a_mask_are_independent() -> None:
    x = np.concatenate([mask(2, step, 1, (256, 256), 0.5) for step in range(1, 5)]) - 0.5
    for table in (x, x.T):
        correlations = 4 * (table @ table.T) / table.shape[1]
        apart = correlations[~np.eye(len(table), dtype=bool)]
        assert np.abs(apart).max() < 6 / np.sqrt(table.shape[1])
        assert abs(apart.std() * np.sqrt(table.shape[1]) - 1) < 0.02
    spectrum = np.abs(np.fft.fft2(x)) ** 2 / (x.size / 4)
    # Power of white noise is exponential: nothing stands out, and its spread equals its mean.
    assert spectrum.max() < 2 * np.log(spectrum.size)
    assert abs(spectrum.std() - 1) < 0.02


def test_four_corners_of_a_rectangle_are_independent() -> None:
    """Rows and columns are hashed apart: the first thing that a weak combination would show."""
    signs = np.sign(mask(9, 3, 2, (512, 512), 0.5) - 0.5)
    corners = signs[:-1, :-1] * signs[1:, :-1] * signs[:-1, 1:] * signs[1:, 1:]
    assert abs(corners.mean()) < 4.5 / np.sqrt(corners.size)
    far = signs[:256, :256] * signs[256:, :256] * signs[:256, 256:] * signs[256:, 256:]
    assert abs(far.mean()) < 4.5 / np.sqrt(far.size)


def test_patterns_of_eight_neighbours_are_uniform() -> None:
    bits = np.concatenate([mask(4, step, 1, (512, 512), 0.5) for step in range(1, 5)]).astype(np.int64)
    codes = bits.reshape(-1, 8) @ (2 ** np.arange(8))
    counts = np.bincount(codes, minlength=256)
    expected = len(codes) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 4.5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_recurrent_layers_acts_on_what_the_first_layer_gives(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    whole = kind(3, 4, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
    x = torch.randn(5, 6, 3)
    with DropoutMode(SEED, STEP) as mode:
        result, last = whole(x)
    assert mode.calls == 1
    first, second = (kind(size, 4, batch_first=True, bidirectional=True) for size in (3, 8))
    first.load_state_dict({n: t for n, t in whole.state_dict().items() if "_l0" in n})
    second.load_state_dict({n.replace("_l1", "_l0"): t for n, t in whole.state_dict().items() if "_l1" in n})
    middle, end = first(x)
    with DropoutMode(SEED, STEP):
        middle = F.dropout(middle, 0.5)
    wanted, after = second(middle)
    torch.testing.assert_close(result, wanted)
    states = (last, end, after) if isinstance(last, Tensor) else (last[0], end[0], after[0])
    torch.testing.assert_close(states[0], torch.cat(states[1:]))
