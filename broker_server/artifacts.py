"""What a federation hands back: the trained model, ready to deploy, in 32-bit floats and in 8-bit integers.

A folder holds ``infer.onnx`` with its weights inside, ``infer.int8-dynamic.onnx``, ``infer.int8-static.onnx`` where
there is data to calibrate it, ``global.safetensors`` by parameter name, and ``report.json``, which tells how large,
how fast and how good each is.
"""

import itertools
import platform
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import safetensors.numpy
from onnx import numpy_helper

from broker_server.measurement import inputs_of, latency, metrics, shortfall
from broker_server.quantization import Inputs, eight_bit_share, quantize
from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.data import DataSource
from edge_client.errors import BundleError, FedgeError, TrainingError
from edge_client.manifest import Feature, Manifest

FP32 = "infer.onnx"
DYNAMIC = "infer.int8-dynamic.onnx"
STATIC = "infer.int8-static.onnx"
TENSORS = "global.safetensors"
REPORT = "report.json"

Array = npt.NDArray[np.generic]


class Model(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model of the report."""

    file: str
    bytes: int = 0
    milliseconds: dict[str, float] = {}
    """Median of a run on this machine, by the number of examples: ``1`` and ``32``."""
    metrics: dict[str, float] = {}
    """See `broker_server.measurement.metrics`."""
    eight_bit: float = 0.0
    """The share of the values of matrices and kernels that are stored in 8 bits."""
    worse: str = ""
    """In what it is worse than ``infer.onnx`` by more than an 8-bit model should be; empty where it is not."""
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
    onnxruntime: str
    """The version that quantized and measured."""
    machine: str
    threads: int
    """Threads that a run was timed with."""


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
        vector: the trained model, ``[trained.size] float32``.
        data: held-out data. It calibrates the static 8-bit model, which there is none of without it, and says how good
            each model is.
        buffers: the trained buffers, ``[tracked.size] float32``; the bundle's own when not given.
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


def check_folder(folder: Path) -> None:
    """Refuse a place for artifacts where something else is: what is there is replaced.

    Raises:
        FedgeError: it is a file, or a folder with other files.
    """
    if folder.exists() and not folder.is_dir():
        raise FedgeError(f"{folder} is a file; name a folder with -o")
    known = {FP32, DYNAMIC, STATIC, TENSORS, REPORT}
    others = sorted({entry.name for entry in folder.iterdir()} - known) if folder.is_dir() else []
    if others:
        raise FedgeError(f"{folder} holds {others[0]!r}, which is no model of ours; name a new folder with -o")


def named_tensors(bundle: Bundle, vector: Vector, buffers: Vector | None = None) -> dict[str, Array]:
    """All parameters by name, each of its own shape and dtype, with those that are trained taken from ``vector``.

    Raises:
        CodecError: ``vector`` or ``buffers`` is of another size or dtype.
    """
    manifest = bundle.manifest
    tensors = {name: np.asarray(array, order="C") for name, array in bundle.weights.items()}
    tensors.update(bundle.trained.views(vector))
    if buffers is not None:
        dtypes = {parameter.name: parameter.dtype for parameter in manifest.parameters}
        for name, view in bundle.tracked.views(buffers).items():
            tensors[name] = view.astype(dtypes[name])
    return tensors


def read_report(folder: Path) -> Report | None:
    """The report of a folder of models; None where there is none that this version reads."""
    try:
        return msgspec.json.decode((folder / REPORT).read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError):
        return None


def read_tensors(path: Path, bundle: Bundle) -> tuple[Vector, Vector]:
    """Trained weights for ``bundle`` from a safetensors file, such as ``global.safetensors``: parameters and buffers.

    Both are float32, ``[trained.size]`` and ``[tracked.size]``; buffers and personal parameters that the file does not
    have are the bundle's own.

    Raises:
        BundleError: the file cannot be read, lacks a parameter, or holds one of another shape.
    """
    try:
        given = safetensors.numpy.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise BundleError(
            f"{path}: no safetensors file ({error}); give the weights that belong to the bundle"
        ) from error
    for parameter in bundle.manifest.parameters:
        found = given.get(parameter.name)
        if found is None and parameter.role == "trainable":
            raise BundleError(f"{path} has no {parameter.name!r}, which the bundle trains; is it of another model?")
        if found is not None and found.shape != parameter.shape:
            raise BundleError(
                f"{path}: {parameter.name!r} is {list(found.shape)}, in the bundle {list(parameter.shape)}; "
                "is it of another model?"
            )
    values = {**bundle.weights, **given}
    vector, buffers = (
        layout.flatten({t.name: np.asarray(values[t.name], np.float32) for t in layout.tensors})
        for layout in (bundle.trained, bundle.tracked)
    )
    return vector, buffers


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
    models = [_described(folder / FP32, manifest, data, threads)]
    models.append(_quantized(model, folder / DYNAMIC, manifest, None, data, models[0], threads))
    if data is None:
        models.append(Model(STATIC, problem="without held-out data there is nothing to calibrate it with"))
    else:
        inputs = partial(_calibration, manifest, data)
        models.append(_quantized(model, folder / STATIC, manifest, inputs, data, models[0], threads))
    report = Report(
        name=manifest.name,
        bundle=bundle.digest,
        parameters=sum(tensor.size for tensor in tensors.values()),
        about=about,
        models=tuple(models),
        samples=0 if data is None else data.samples,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        onnxruntime=runtime.VERSION,
        machine=f"{platform.system()} {platform.machine()}",
        threads=threads,
    )
    (folder / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _calibration(manifest: Manifest, data: DataSource) -> Iterator[dict[str, Array]]:
    """Inputs of a few hundred samples: the ranges of activations settle with that many."""
    for batch in itertools.islice(data.batches(64, seed=0), 8):
        yield inputs_of(manifest, batch)


def _quantized(
    model: onnx.ModelProto,
    path: Path,
    manifest: Manifest,
    inputs: Inputs | None,
    data: DataSource | None,
    floats: Model,
    threads: int,
) -> Model:
    problem = quantize(model, path, inputs)
    if problem:
        return Model(path.name, problem=problem)
    found = _described(path, manifest, data, threads, reference=path.with_name(FP32).read_bytes())
    return msgspec.structs.replace(
        found,
        eight_bit=round(eight_bit_share(onnx.load(path).graph), 4),
        worse=shortfall(found.metrics, floats.metrics),
    )


def _described(
    path: Path, manifest: Manifest, data: DataSource | None, threads: int, reference: bytes | None = None
) -> Model:
    graph = path.read_bytes()
    reached = metrics(graph, manifest, data, reference=reference, threads=threads)
    return Model(path.name, len(graph), latency(graph, manifest, threads=threads), reached)
