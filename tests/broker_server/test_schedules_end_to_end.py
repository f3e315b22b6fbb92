"""All that a client does against over-fitting, in a federation of emulated phones, and what it tells of it."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from broker_server.aggregation.algorithm import Algorithm
from broker_server.aggregation.streaming import Share, weighted_sum
from broker_server.config import Federation
from broker_server.simulation import simulate
from edge_client.course import Course
from export.bundle import export_bundle

SEEN = []
"""What the updates of this process's runs said."""


def noting(options, local):
    def share(update, report):
        SEEN.append(report)
        return Share(report.weight * report.scale, (report.weight,))

    return weighted_sum(share, lambda sums: sums[0])


NOTING = Algorithm(make=noting, needs=("steps", "distance", "epochs", "validation.loss.before"))
RATE, EPOCHS, BATCH = 0.05, 6, 20


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 10))


def test_clients_stop_early_at_falling_rates_and_the_model_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export_bundle(
        network(), tmp_path / "b.fedge", name="b", inputs=[((1, 8, 8), "float32")], scale=1 / 16, optimizer="momentum",
        loss_options={"label_smoothing": 0.1}, clip=0.0, proximal=True,
    )  # fmt: skip
    digits = load_digits()
    x, y = digits.images[:, None].astype(np.uint8), digits.target
    np.savez(tmp_path / "train.npz", x=x[:300], y=y[:300])
    np.savez(tmp_path / "test.npz", x=x[1200:], y=y[1200:])
    settings = {
        "federation": {"name": "b", "bundle": str(tmp_path / "b.fedge"), "state": str(tmp_path / "state")},
        "round": {"cohort": 3, "deadline": 60.0},
        "codec": {"value": 0.1},
        "transfer": {"spread": 0.0},
        "train": {
            "batch_size": BATCH,
            "epochs": EPOCHS,
            "hypers": {"lr": RATE, "weight_decay": 1e-3, "mu": 0.01, "max_norm": 5.0},
            "schedule": "cosine",
            "decay": {"kind": "exponential", "every": 1, "factor": 0.8},
            "validation": 0.25,
            "patience": 1,
        },
        "aggregation": {"algorithm": f"{__name__}:NOTING"},
        "stop": {"rounds": 3},
        "evaluation": {"data": str(tmp_path / "test.npz")},
        "simulation": {"clients": 3, "data": str(tmp_path / "train.npz"), "split": "iid", "slots": 1},
    }
    SEEN.clear()
    result = asyncio.run(asyncio.wait_for(simulate(msgspec.convert(settings, Federation), lambda _: None), 100))
    assert result.rounds[-1].metrics["accuracy"] > 0.5
    assert len(SEEN) == 9
    for number, report in enumerate(SEEN):
        said, batches = report.scalars, -(-report.samples // BATCH)
        assert said["validation.loss.after"] <= said["validation.loss.before"]
        assert said["steps"] <= batches * said["epochs"] <= batches * EPOCHS
        course = Course(batches * EPOCHS, schedule="cosine")
        rates = [RATE * 0.8 ** (number // 3) * course.factor(step) for step in range(int(said["steps"]))]
        assert said["distance"] == pytest.approx(sum(rates), rel=1e-5)
    # The same samples are aside in every round.
    assert len({(report.client, report.samples) for report in SEEN}) == 3
