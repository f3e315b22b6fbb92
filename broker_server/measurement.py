"""What a deployable model is worth and what it costs: its metrics on held-out data, and the time of a run."""

import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from edge_client import runtime
from edge_client.data import DataSource, fill
from edge_client.manifest import Manifest

Array = npt.NDArray[np.generic]

BATCH = 32
"""Examples in the batch whose time is reported beside that of one example."""

ACCURACY_LOST, ERROR_RATIO, DIFFERENCE = 0.01, 1.05, 0.05
"""How much worse an 8-bit model may be than the one in floats before its report says so: accuracy less, error times,
and, where neither is known, how far its outputs may move."""

_METRICS = {
    "cross_entropy": "accuracy",
    "nll": "accuracy",
    "bce_with_logits": "accuracy",
    "mse": "squared_error",
    "huber": "squared_error",
    "smooth_l1": "squared_error",
    "l1": "absolute_error",
}
_ROWS = 256
_RUNS = 25
_SECONDS = 0.25


def inputs_of(manifest: Manifest, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The model's inputs as its graph takes them: integer data is scaled, as on the devices."""
    rows, inputs = len(batch[manifest.inputs[0].name]), {}
    for feature in manifest.inputs:
        inputs[feature.name] = np.empty((rows, *feature.shape), feature.dtype)
        fill(inputs[feature.name], batch[feature.name], feature)
    return inputs


def metrics(
    graph: bytes, manifest: Manifest, data: DataSource | None, *, reference: bytes | None = None, threads: int = 1
) -> dict[str, float]:
    """What a graph reaches on ``data``; without any, only ``difference``, on a batch of random numbers.

    Where the bundle's loss is a named one: ``accuracy`` for class scores and logits (each target that is a class counts
    once: in sequences, each place), ``squared_error`` or ``absolute_error`` for values. With the graph ``reference``
    also ``difference``, how far the outputs are from its outputs: root of the mean square, relative to theirs.

    Raises:
        BundleError: this onnxruntime cannot load a graph.
    """
    session = runtime.session(graph, threads=threads)
    other = None if reference is None else runtime.session(reference, threads=threads)
    names = [output.name for output in manifest.outputs]
    metric = _METRICS.get(manifest.loss) if len(names) == len(manifest.targets) == 1 else None
    total, count, moved, size = 0.0, 0, 0.0, 0.0
    for batch in (None,) if data is None else data.batches(_ROWS, seed=None):
        inputs = _random(manifest, BATCH) if batch is None else inputs_of(manifest, batch)
        outputs = session.run(names, inputs)
        if metric is not None and batch is not None:
            scores = _scores(manifest.loss, outputs[0], batch[manifest.targets[0].name].astype(np.float64))
            total += float(scores.sum(dtype=np.float64))
            count += scores.size
        if other is not None:
            for output, expected in zip(outputs, other.run(names, inputs), strict=True):
                moved += float(np.square(output - expected, dtype=np.float64).sum())
                size += float(np.square(expected, dtype=np.float64).sum())
    found = {metric: total / count} if metric is not None and count else {}
    return found if other is None else found | {"difference": float(np.sqrt(moved / (size or 1.0)))}


def latency(graph: bytes, manifest: Manifest, *, threads: int) -> dict[str, float]:
    """Median milliseconds of a run, by how many examples it takes: 1, and a batch of 32.

    Raises:
        BundleError: this onnxruntime cannot load the graph.
    """
    session = runtime.session(graph, threads=threads)
    found = {}
    for rows in (1, BATCH):
        found[str(rows)] = round(_median(partial(session.run, None, _random(manifest, rows))), 4)
    return found


def shortfall(found: Mapping[str, float], floats: Mapping[str, float]) -> str:
    """In what an 8-bit model is worse than the one in floats by more than is allowed; empty where it is not."""
    for name, value in floats.items():
        if name == "accuracy" and value - found[name] > ACCURACY_LOST:
            return f"accuracy is {found[name]:.4f}, in floats {value:.4f}: more than {ACCURACY_LOST} less"
        if name != "accuracy" and found[name] > ERROR_RATIO * value:
            return f"{name} is {found[name]:.4g}, in floats {value:.4g}: more than {ERROR_RATIO} times as much"
    moved = found.get("difference", 0.0)
    if not floats and moved > DIFFERENCE:
        return f"outputs are {moved:.3f} of their size away from those in floats: more than {DIFFERENCE}"
    return ""


def _random(manifest: Manifest, rows: int) -> dict[str, Array]:
    """Inputs that any model takes: random floats, and of integers zeros, as their range is not known."""
    rng = np.random.default_rng(0)
    return {
        feature.name: rng.standard_normal((rows, *feature.shape), np.float32)
        if feature.dtype == "float32"
        else np.zeros((rows, *feature.shape), feature.dtype)
        for feature in manifest.inputs
    }


def _median(run: Callable[[], object]) -> float:
    """Milliseconds, after a first run that is not counted."""
    run()
    times: list[float] = []
    while len(times) < 3 or (len(times) < _RUNS and sum(times) < _SECONDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def _scores(loss: str, output: npt.NDArray[np.float32], target: npt.NDArray[np.float64]) -> Array:
    """What the metric is the mean of: hits, or errors."""
    if _METRICS[loss] != "accuracy":
        error = output.astype(np.float64) - target.reshape(output.shape)
        return np.square(error) if _METRICS[loss] == "squared_error" else np.abs(error)
    if loss == "bce_with_logits":
        return np.asarray((output > 0) == (target > 0.5).reshape(output.shape))
    # Padding and the like, which losses ignore, is no class.
    return np.extract((target >= 0) & (target < output.shape[-1]), output.argmax(-1) == target)
