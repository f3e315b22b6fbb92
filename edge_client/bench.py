"""How fast a device trains a bundle, and what that takes: memory, heat, energy where the board measures it."""

import time
from collections.abc import Iterator

import msgspec
import numpy as np

from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.data import Array
from edge_client.manifest import Feature, Manifest
from edge_client.service.board import Board, resident
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan

_SAMPLES = 256
_WARM = 3
_LOOK = 0.5
"""Seconds between two looks at temperature and power."""


class Benchmark(msgspec.Struct, frozen=True):
    """What was measured; None where the board does not tell."""

    board: str
    bundle: str
    parameters: int
    batch_size: int
    threads: int
    onnxruntime: str
    steps: int
    seconds: float
    steps_per_second: float
    samples_per_second: float
    peak_mib: float
    """Of the whole process, at its peak."""
    degrees_before: float | None
    degrees_hottest: float | None
    watts: float | None
    """Mean of the whole board while it trained."""
    joules_per_step: float | None


class NoiseSource:
    """Samples of the bundle's shapes that mean nothing: ``count`` of them, drawn once."""

    def __init__(self, manifest: Manifest, count: int = _SAMPLES) -> None:
        rng = np.random.default_rng(0)
        self.samples = count
        classes = manifest.outputs[0].shape[-1] if manifest.outputs and manifest.outputs[0].shape else 2
        self._arrays = {f.name: _noise(f, count, 2, rng) for f in manifest.inputs}
        self._arrays |= {f.name: _noise(f, count, max(1, classes), rng) for f in manifest.targets}

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Array]]:
        """One pass, in order whatever the seed; what is left over is left out, so that all batches cost the same."""
        for start in range(0, self.samples - size + 1, size):
            yield {name: array[start : start + size] for name, array in self._arrays.items()}


def measure(
    bundle: Bundle, *, seconds: float = 10.0, batch_size: int = 32, threads: int = 1, board: Board | None = None
) -> Benchmark:
    """Train on noise for so many seconds.

    Raises:
        BundleError, TrainingError: as `Trainer`.
    """
    board = board or Board()
    trainer = Trainer(bundle, threads=threads)
    source = NoiseSource(bundle.manifest, max(_SAMPLES, batch_size))
    trainer.train(bundle.first(bundle.trained), source, TrainPlan(steps=_WARM, batch_size=batch_size), seed=0)
    before = board.degrees()
    heat, power = [] if before is None else [before], []
    deadline, look = time.perf_counter() + seconds, 0.0

    def over() -> bool:
        nonlocal look
        now = time.perf_counter()
        if now >= look:
            look = now + _LOOK
            if (degrees := board.degrees()) is not None:
                heat.append(degrees)
            if (watts := board.watts()) is not None:
                power.append(watts)
        return now >= deadline

    plan = TrainPlan(steps=10_000_000, batch_size=batch_size)
    result = trainer.train(bundle.first(bundle.trained), source, plan, seed=0, stop=over)
    rate = result.steps / result.seconds
    mean = sum(power) / len(power) if power else None
    return Benchmark(
        board=board.model(),
        bundle=bundle.manifest.name,
        parameters=bundle.trained.size,
        batch_size=batch_size,
        threads=threads,
        onnxruntime=runtime.VERSION,
        steps=result.steps,
        seconds=result.seconds,
        steps_per_second=rate,
        samples_per_second=rate * batch_size,
        peak_mib=resident() / 2**20,
        degrees_before=before,
        degrees_hottest=max(heat, default=None),
        watts=mean,
        joules_per_step=None if mean is None or not rate else mean / rate,
    )


def _noise(feature: Feature, count: int, classes: int, rng: np.random.Generator) -> Array:
    shape = (count, *feature.shape)
    if feature.dtype == "int64":
        return rng.integers(0, classes, shape)
    return rng.normal(size=shape).astype(np.float32)
