"""The ready models are of the shapes and sizes that their docstrings promise."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from export.models.digits import digits_cnn
from export.models.keyword import ds_cnn
from export.models.logistic import logistic_regression
from export.models.lora import gpt_lora
from export.models.mcmahan import mnist_2nn, mnist_cnn
from export.models.resnet import resnet8
from export.models.sensors import sensor_cnn, sensor_lstm
from export.models.transformer import char_transformer

CODES = torch.randint(0, 80, (3, 64), generator=torch.Generator().manual_seed(0))

MODELS: list[tuple[Callable[[], nn.Module], Tensor, tuple[int, ...]]] = [
    (logistic_regression, torch.zeros(3, 1, 28, 28), (10,)),
    (mnist_2nn, torch.zeros(3, 1, 28, 28), (10,)),
    (mnist_cnn, torch.zeros(3, 1, 28, 28), (10,)),
    (digits_cnn, torch.zeros(3, 1, 8, 8), (10,)),
    (ds_cnn, torch.zeros(3, 1, 49, 10), (12,)),
    (resnet8, torch.zeros(3, 3, 32, 32), (10,)),
    (sensor_cnn, torch.zeros(3, 9, 128), (6,)),
    (sensor_lstm, torch.zeros(3, 9, 128), (6,)),
    (char_transformer, CODES, (64, 80)),
    (gpt_lora, CODES, (64, 80)),
]


@pytest.mark.parametrize(("factory", "batch", "shape"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_is_what_its_docstring_says(
    factory: Callable[[], nn.Module], batch: Tensor, shape: tuple[int, ...]
) -> None:
    module = factory()
    assert module(batch).shape == (3, *shape)
    count = sum(p.numel() for p in module.parameters())
    promised = re.findall(r"([\d,]+)\s+parameters", factory.__doc__ or "")
    assert promised == [f"{count:,}"]


def test_keyword_spotting_halves_frames_and_coefficients_once() -> None:
    first = ds_cnn()[:3]  # type: ignore[index]
    assert first(torch.zeros(2, 1, 49, 10)).shape == (2, 64, 25, 5)


def test_the_transformer_does_not_look_ahead() -> None:
    module, later = char_transformer().eval(), CODES.clone()
    later[:, 40:] = 7
    with torch.no_grad():
        before, after = module(CODES), module(later)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert (before[:, 40:] - after[:, 40:]).abs().max() > 1e-3


def test_of_the_small_gpt_only_the_adapters_train() -> None:
    trained = {n: p.numel() for n, p in gpt_lora().named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(trained.values()) == 65_536
