"""What a federation hands back: the trained model, ready to deploy, in 32-bit floats and in 8-bit integers.

A folder holds ``infer.onnx`` with its weights inside, ``infer.int8.onnx``, ``global.safetensors`` by parameter name,
and ``report.json``, which tells their sizes and how good they are.
"""

import itertools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import safetensors.numpy
from onnx import numpy_helper

from broker_server.quantization import quantize
from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.data import DataSource, fill
from edge_client.errors import FedgeError, TrainingError
from edge_client.manifest import Feature, Manifest

FP32 = "infer.onnx"
INT8 = "infer.int8.onnx"
TENSORS = "global.safetensors"
REPORT = "report.json"

_BATCH = 256

Array = npt.NDArray[np.generic]


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model of the report."""

    file: str
    bytes: int = 0
    metrics: dict[str, float] = {}
    """``accuracy`` for class scores and logits, ``squared_error`` for others; empty without data."""
    problem: str = ""
    """Why there is no such file; empty when there is one."""


class Report(msgspec.Struct, frozen=True):
    """``report.json``."""

    name: str
    bundle: str
    """SHA-256 of the bundle."""
    parameters: int
    about: dict[str, str | int | float]
    models: tuple[Model, ...]
    samples: int
    """Held-out samples that the metrics were measured on."""
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


def write_artifacts(
    folder: Path,
    bundle: Bundle,
    vector: Vector,
    *,
    data: DataSource | None = None,
    buffers: Vector | None = None,
    about: Mapping[str, str | int | float] | None = None,
    threads: int = 1,
) -> Report:
    """Write the folder, all of it or nothing: it is made beside its place and moved there, over one of that name.

    Args:
        folder: where the files go, such as ``state/models/best``.
        bundle: the bundle that was trained.
        vector: the trained model, ``[layout.size] float32``.
        data: held-out data. It calibrates the 8-bit model and measures both; without it the 8-bit model chooses its
            ranges while it runs, and nothing is measured.
        buffers: the trained buffers, flat float32; the bundle's own when not given.
        about: facts for the report, such as version and round.
        threads: threads to measure with.

    Raises:
        CodecError: ``vector`` or ``buffers`` is of another size or dtype.
        TrainingError: ``vector`` holds NaN or infinity.
        FedgeError: the files cannot be written.
    """
    if not np.isfinite(tensors_sum := float(np.abs(vector).sum(dtype=np.float64))):
        raise TrainingError(f"the model cannot be written: its weights hold NaN or infinity (sum {tensors_sum})")
    tensors = named_tensors(bundle, vector, buffers)
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        # What an earlier crash left.
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        report = _write(fresh, bundle, tensors, data, dict(about or {}), threads)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise FedgeError(
            f"{folder}: cannot be written ({error.strerror}); check the disk and the permissions"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def named_tensors(bundle: Bundle, vector: Vector, buffers: Vector | None = None) -> dict[str, Array]:
    """All parameters by name, each of its own shape and dtype, with the trainable ones taken from ``vector``.

    Raises:
        CodecError: ``vector`` or ``buffers`` is of another size or dtype.
    """
    manifest = bundle.manifest
    tensors = {name: np.ascontiguousarray(array) for name, array in bundle.weights.items()}
    tensors.update(manifest.layout().views(vector))
    if buffers is not None:
        dtypes = {parameter.name: parameter.dtype for parameter in manifest.parameters}
        for name, view in manifest.layout("buffer").views(buffers).items():
            tensors[name] = view.astype(dtypes[name])
    return tensors


def with_weights(graph: bytes, tensors: Mapping[str, Array]) -> onnx.ModelProto:
    """The graph with the values of its constants inside, for runtimes that know nothing of fedge."""
    model = onnx.load_from_string(graph)
    for constant in model.graph.initializer:
        if constant.data_location == onnx.TensorProto.EXTERNAL:
            value = tensors[constant.name.removeprefix("param.")]
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))
    return model


def _write(
    folder: Path,
    bundle: Bundle,
    tensors: Mapping[str, Array],
    data: DataSource | None,
    about: dict[str, str | int | float],
    threads: int,
) -> Report:
    manifest = bundle.manifest
    facts = {key: str(value) for key, value in {"name": manifest.name, "bundle": bundle.digest, **about}.items()}
    # Not save_file, which makes a file that only its owner may read.
    (folder / TENSORS).write_bytes(safetensors.numpy.save(dict(tensors), metadata=facts))
    model = with_weights(bundle.infer, tensors)
    onnx.checker.check_model(model)
    (folder / FP32).write_bytes(model.SerializeToString())
    inputs = None if data is None else lambda: _calibration(manifest, data)
    problem = quantize(model, folder / INT8, inputs)
    models = [_measure(folder / FP32, manifest, data, threads)]
    models.append(Model(INT8, problem=problem) if problem else _measure(folder / INT8, manifest, data, threads))
    report = Report(
        name=manifest.name,
        bundle=bundle.digest,
        parameters=sum(tensor.size for tensor in tensors.values()),
        about=about,
        models=tuple(models),
        samples=0 if data is None else data.samples,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
    )
    (folder / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _calibration(manifest: Manifest, data: DataSource) -> Iterator[dict[str, Array]]:
    """Inputs of a few hundred samples: the ranges of activations settle with that many."""
    for batch in itertools.islice(data.batches(64, seed=0), 8):
        yield _inputs(manifest, batch)


def _inputs(manifest: Manifest, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The model's inputs as its graph takes them: integer data is scaled, as on the devices."""
    rows, inputs = len(batch[manifest.inputs[0].name]), {}
    for feature in manifest.inputs:
        inputs[feature.name] = np.empty((rows, *feature.shape), feature.dtype)
        fill(inputs[feature.name], batch[feature.name], feature)
    return inputs


def _measure(path: Path, manifest: Manifest, data: DataSource | None, threads: int) -> Model:
    graph = path.read_bytes()
    if data is None or len(manifest.outputs) != 1 or len(manifest.targets) != 1:
        return Model(path.name, len(graph))
    session = runtime.session(graph, threads=threads)
    target, total, count = manifest.targets[0].name, 0.0, 0
    for batch in data.batches(_BATCH, seed=None):
        (output,) = session.run([manifest.outputs[0].name], _inputs(manifest, batch))
        scores = _scores(manifest.loss, output, batch[target].astype(np.float64))
        total += float(scores.sum(dtype=np.float64))
        count += scores.size
    metric = "accuracy" if manifest.loss in ("cross_entropy", "bce_with_logits") else "squared_error"
    return Model(path.name, len(graph), {metric: total / count})


def _scores(loss: str, output: npt.NDArray[np.float32], target: npt.NDArray[np.float64]) -> Array:
    """What the metric is the mean of: hits, or squared errors."""
    if loss == "cross_entropy":
        return np.asarray(output.argmax(-1) == target)
    if loss == "bce_with_logits":
        return np.asarray((output > 0) == (target > 0.5))
    return np.square(output.astype(np.float64) - target.reshape(output.shape))
