"""Training and evaluation of a run's clients: cheap, the same again for the same input, and different for each client.

It stands where the ONNX trainer does, so that everything around it - worker, store, codec, aggregation - is the real
thing: what a client learns depends on the model that it received, on its data and on its task's seed.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.trainer import Epoch, TrainResult
from edge_client.wire.messages import TrainPlan


@dataclass(frozen=True)
class Data:
    """A client's data: a number of samples and a place that they pull the model to."""

    samples: int
    place: int

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Any]]:
        """Never asked for: the trainer looks at no batch."""
        raise AssertionError("the simulated trainer reads no batches")

    def target(self, size: int) -> Vector:
        """``[size] float32``: where this data pulls the parameters."""
        return np.random.default_rng(self.place).normal(0, 1, size).astype(np.float32)


class Pull:
    """A trainer that moves the model a part of the way to its data's place."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def train(
        self,
        model: Vector,
        source: Data,
        plan: TrainPlan,
        *,
        seed: int,
        stop: Callable[[], bool] | None = None,
        buffers: Vector | None = None,
        control: Vector | None = None,
        after: Callable[[Epoch], bool] | None = None,
        anchor: Vector | None = None,
        fixed: Collection[str] = (),
    ) -> TrainResult:
        """As `edge_client.trainer.Trainer.train`."""
        del stop, after, anchor, fixed
        noise = np.random.default_rng(seed).normal(0, 0.02, model.size).astype(np.float32)
        model += np.float32(0.3) * (source.target(model.size) - model) + noise
        if control is not None:
            model -= np.float32(0.1) * control
        moved = self.bundle.initial_buffers() if buffers is None else buffers.copy()
        moved += np.float32(1.0)
        loss = float(np.square(noise).sum())
        sums = {"loss": loss, "count": float(source.samples), "correct": float(source.samples // 2)}
        steps, distance = plan.epochs, 0.3 * plan.epochs
        return TrainResult(model, moved, source.samples, steps, distance, plan.epochs, 0.1, loss, sums, finished=True)

    def evaluate(
        self, vector: Vector, source: Data, *, batch_size: int = 64, buffers: Vector | None = None
    ) -> dict[str, float]:
        """As `edge_client.trainer.Trainer.evaluate`."""
        del batch_size, buffers
        loss = float(np.square(vector - source.target(vector.size)).sum())
        return {"loss": loss, "count": float(source.samples), "correct": float(source.samples) / (1 + loss)}


class Held:
    """As `broker_server.evaluation.HeldOut`."""

    source = None

    @classmethod
    def open(cls, bundle: Bundle, spec: str, *, batch_size: int = 256, threads: int = 1) -> "Held":
        """Nothing is read."""
        del bundle, spec, batch_size, threads
        return cls()

    def evaluate(self, vector: Vector, *, buffers: Vector | None = None) -> dict[str, float]:
        """Metrics of a model."""
        del buffers
        loss = float(np.square(vector).sum())
        return {"loss": loss, "accuracy": 1 / (1 + loss)}
