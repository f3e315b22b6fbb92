"""Dropout in whole exports: masks that a seed and the step's number decide, and none in evaluation."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan
from export.bundle import export_bundle
from tests.export.loaded import graph_of


def test_a_network_with_dropout_trains_on_masks_of_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, 3))
    # Its parity with PyTorch, masks included, is checked by the export.
    export_bundle(module, tmp_path / "d.fedge", name="d", inputs=[((6,), "float32")])
    bundle = Bundle.open(tmp_path / "d.fedge")
    assert {"seed", "step"} <= {i.name for i in graph_of(tmp_path / "d.fedge", "train").graph.input}
    assert not {"seed", "step"} & {i.name for i in graph_of(tmp_path / "d.fedge", "eval").graph.input}

    generator = np.random.default_rng(0)
    source = ArraySource({"x": generator.standard_normal((16, 6)).astype(np.float32), "y": np.arange(16) % 3})
    trainer, whole = Trainer(bundle), TrainPlan(steps=4, batch_size=16)
    first, again, other = (trainer.train(bundle.initial(), source, whole, seed=seed).local for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4

    # One batch, no learning: only the step's number can change what the loss sees.
    still = TrainPlan(steps=1, batch_size=16, hypers={"lr": 0.0})
    two = TrainPlan(steps=2, batch_size=16, hypers={"lr": 0.0})
    ones = ArraySource({"x": np.ones((16, 6), np.float32), "y": np.zeros(16, np.int64)})
    losses = [trainer.train(bundle.initial(), ones, plan, seed=1).loss for plan in (still, two)]
    assert losses[0] != losses[1]


def test_adapters_of_a_transformer_with_dropout(tmp_path: Path) -> None:
    from export.lora import Lora

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    module = nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))
    report = export_bundle(
        module, tmp_path / "t.fedge", name="t", inputs=[((5,), "int64")], lora=Lora(rank=2, targets=["1.*"])
    )
    trained = [p.name for p in report.manifest.parameters if p.role == "trainable"]
    assert len(trained) == 8
    assert all("lora" in name for name in trained)
