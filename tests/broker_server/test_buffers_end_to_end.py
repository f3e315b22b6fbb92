"""A network with batch normalisation in a federation of emulated phones: its statistics travel, and evaluate."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import nn

from broker_server.config import Federation
from broker_server.simulation import simulate
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer
from export.bundle import export_bundle


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("codec", "accuracy"), [("quantized", 0.4), ("none", 0.8)])
def test_the_server_evaluates_with_the_federated_statistics(tmp_path: Path, codec: str, accuracy: float) -> None:
    torch.manual_seed(0)
    export_bundle(network(), tmp_path / "b.fedge", name="b", inputs=[((1, 8, 8), "float32")], scale=1 / 16, lr=0.1)
    digits = load_digits()
    x, y = digits.images[:, None].astype(np.uint8), digits.target
    np.savez(tmp_path / "train.npz", x=x[:1200], y=y[:1200])
    np.savez(tmp_path / "test.npz", x=x[1200:], y=y[1200:])
    settings = {
        "federation": {"name": "b", "bundle": str(tmp_path / "b.fedge"), "state": str(tmp_path / "state")},
        "round": {"cohort": 4, "deadline": 60.0},
        "codec": {"kind": codec, "target": "step", "value": 2.0},
        "transfer": {"spread": 0.0},
        "train": {"batch_size": 20, "epochs": 2},
        "stop": {"rounds": 3},
        "evaluation": {"data": str(tmp_path / "test.npz")},
        "simulation": {
            "clients": 6,
            "data": str(tmp_path / "train.npz"),
            "split": "iid",
            "slots": 1,
            "test_fraction": 0,
        },
    }
    result = asyncio.run(asyncio.wait_for(simulate(msgspec.convert(settings, Federation), lambda _: None), 100))
    metrics = result.rounds[-1].metrics
    assert metrics["accuracy"] > accuracy

    module = network().eval()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "state" / "models" / "last" / "global.safetensors"))
    with torch.no_grad():
        logits = module(torch.tensor(x[1200:]).float() / 16)
        loss = nn.functional.cross_entropy(logits, torch.tensor(y[1200:])).item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1).numpy() == y[1200:]).mean(), abs=2e-3)
    # Each client makes 20 steps a round: 200 samples, batches of 20, two epochs.
    assert module[1].num_batches_tracked == 60  # type: ignore[union-attr]

    bundle = Bundle.open(tmp_path / "b.fedge")
    vector = bundle.layout.flatten({n: p.detach().numpy() for n, p in module.named_parameters()})
    untouched = Trainer(bundle).evaluate(vector, ArraySource({"x": x[1200:], "y": y[1200:]}))
    assert untouched["loss"] / untouched["count"] > 1.2 * loss
