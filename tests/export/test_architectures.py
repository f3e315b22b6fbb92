"""Published architectures export, train and evaluate as in PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edge_client.manifest import Feature
from export import verify
from export.bundle import export_bundle
from export.lora import Lora, add_adapters
from export.models.keyword import ds_cnn
from export.models.sensors import sensor_cnn, sensor_lstm
from export.models.transformer import char_transformer
from tests.export import architectures as images
from tests.export import sequences
from tests.export.training import LossFunction, assert_trains_as_pytorch, gathered


@dataclass(frozen=True)
class Case:
    """A network, the shapes of one example's inputs (ranks of tokens where ``tokens``), and what it learns."""

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    classes: int = 10
    """0: numbers, of the shape of ``target``."""
    target: tuple[int, ...] = ()
    tokens: int = 0
    batch: int = 8
    loss: str | LossFunction = "cross_entropy"
    function: LossFunction = gathered


def adapted() -> nn.Module:
    """A small GPT of which only adapters train."""
    module, chosen = add_adapters(char_transformer(), Lora(rank=4))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen and not parameter.any():
            # Half of an adapter is zero at first, and so is the other half's gradient.
            nn.init.normal_(parameter, std=0.02)
    return module


CASES = {
    "MobileNetV2": Case(images.mobilenet_v2, ((3, 32, 32),), batch=16),
    "ResNet-18": Case(images.resnet18, ((3, 32, 32),), batch=4),
    "ViT-tiny": Case(lambda: images.VisionTransformer(32, 10, depth=3), ((3, 32, 32),)),
    "EfficientNet": Case(images.efficientnet, ((3, 32, 32),)),
    "ShuffleNet": Case(images.shufflenet, ((3, 32, 32),)),
    "SqueezeNet": Case(images.squeezenet, ((3, 48, 48),)),
    "DenseNet": Case(images.densenet, ((3, 16, 16),)),
    "ConvNeXt": Case(images.convnext, ((3, 32, 32),)),
    "MobileViT": Case(images.mobilevit, ((3, 32, 32),)),
    "U-Net": Case(images.UNet, ((1, 16, 24),), classes=3, target=(16, 24)),
    "autoencoder": Case(images.autoencoder, ((1, 28, 28),), 0, (1, 28, 28), loss="mse", function=F.mse_loss),
    "DS-CNN": Case(ds_cnn, ((1, 49, 10),), 12),
    "M5": Case(sequences.Spoken, ((1, 4000),), loss="nll", function=F.nll_loss),
    "1-D CNN": Case(sensor_cnn, ((9, 128),), 6),
    "LSTM": Case(sensor_lstm, ((9, 128),), 6),
    "TCN": Case(sequences.Tcn, ((9, 64),), 6),
    "DeepConvLSTM": Case(sequences.DeepConvLstm, ((9, 40),), 6),
    "GRU tagger": Case(sequences.Tagger, ((20,),), 9, (20,), tokens=60),
    "BERT": Case(sequences.Encoder, ((24,),), 4, tokens=60),
    "Llama": Case(sequences.Gpt, ((32,),), 60, (32,), tokens=60),
    "GPT with LoRA": Case(adapted, ((64,),), 80, (64,), tokens=80),
    "N-BEATS": Case(sequences.Forecaster, ((48,),), 0, (12,), loss="huber", function=F.huber_loss),
    "VAE": Case(sequences.Vae, ((20,), (4,)), 0, (20,), loss=sequences.elbo, function=sequences.elbo),
}  # fmt: skip


HEAVY = ("MobileNetV2", "ResNet-18", "EfficientNet")
"""Checked at export on small batches only: a batch of 32 would take a minute."""


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make()


def batch(case: Case, seed: int) -> dict[str, Any]:
    generator, rows = np.random.default_rng(seed), case.batch
    found: dict[str, Any] = {}
    for i, shape in enumerate(case.inputs):
        drawn = generator.integers(0, case.tokens, (rows, *shape)) if case.tokens else None
        values = generator.standard_normal((rows, *shape)).astype(np.float32) if drawn is None else drawn
        found["x" if i == 0 else f"x{i}"] = values
    size = (rows, *case.target)
    found["y"] = generator.integers(0, case.classes, size) if case.classes else generator.random(size, np.float32)
    return found


def exported(case: Case, path: Path, name: str) -> None:
    kind = "int64" if case.tokens else "float32"
    targets = [Feature("y", case.target, "float32")] if callable(case.loss) else None
    export_bundle(
        made(case), path, name=name, inputs=[(shape, kind) for shape in case.inputs], targets=targets, loss=case.loss,
        lr=0.01,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_trains_and_evaluates_as_in_pytorch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if name in HEAVY:
        monkeypatch.setattr(verify, "BATCHES", (1, 6))
    exported(case, tmp_path / "a.fedge", name)
    assert_trains_as_pytorch(lambda: made(case), tmp_path / "a.fedge", lambda seed: batch(case, seed), case.function)


@pytest.mark.parametrize(
    ("make", "image", "parameters"),
    [
        (lambda: images.mobilenet_v2(1000), 64, 3_504_872),
        (lambda: images.resnet18(1000), 64, 11_689_512),
        (images.VisionTransformer, 224, 5_717_416),
    ],
    ids=["MobileNetV2", "ResNet-18", "ViT-tiny"],
)
def test_it_is_the_published_network(make: Callable[[], nn.Module], image: int, parameters: int) -> None:
    module = make()
    assert sum(p.numel() for p in module.parameters()) == parameters
    with torch.no_grad():
        assert module.eval()(torch.zeros(1, 3, image, image)).shape == (1, 1000)
