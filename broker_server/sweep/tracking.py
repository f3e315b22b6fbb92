"""Results of a sweep for programs that show experiments: MLflow and TensorBoard, each where it is installed."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker_server.sweep.figures import Row
from broker_server.sweep.results import need

Results = Mapping[str, Mapping[str, Any]]
PACKAGES = {"mlflow": "mlflow", "tensorboard": "tensorboardX"}
"""By tracker, the package that writes for it."""
_MLFLOW_BATCH = 1000
"""Metrics that MLflow takes at once."""


def check_trackers(names: Sequence[str]) -> None:
    """Find out before the runs, not after them, that what is asked for is not there.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in names:
        need(PACKAGES[name], f"--track {name}")


def to_mlflow(folder: Path, experiment: str, found: Sequence[Row], results: Results, keys: Sequence[str]) -> str:
    """Write runs to ``folder/mlflow.db``; those that are there already stay as they are.

    Args:
        folder: the sweep's.
        experiment: what the runs are of.
        found: the runs' lines (`figures.rows`): settings become parameters.
        results: the runs' results by name: metrics by round.
        keys: the settings' dotted keys.

    Returns:
        The store's address, which ``mlflow ui --backend-store-uri`` takes.
    """
    # It would tell its makers that it is used.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    address = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=address)
    known = client.get_experiment_by_name(experiment)
    where = (folder.absolute() / "mlflow-artifacts").as_uri()
    number = known.experiment_id if known else client.create_experiment(experiment, artifact_location=where)
    there = {run.info.run_name: run for run in client.search_runs([number], max_results=50_000)}
    for row in found:
        name = row["name"]
        result = results[name]
        fingerprint = result["run"]["fingerprint"]
        if (old := there.get(name)) is not None:
            if old.data.tags.get("fedge.fingerprint") == fingerprint and old.info.status == "FINISHED":
                continue
            client.delete_run(old.info.run_id)
        points = list(_points(result, _ended(folder, name)))
        tags = {"fedge.fingerprint": fingerprint}
        started = round(points[0][2] * 1000) if points else None
        run = client.create_run(number, run_name=name, tags=tags, start_time=started).info.run_id
        settings = {"variant": row["variant"], "seed": row["seed"], **{key: row[key] for key in keys}}
        client.log_batch(run, params=[Param(_mlflow_name(key), str(value)) for key, value in settings.items()])
        metrics = [
            Metric(_mlflow_name(key), value, round(seconds * 1000), step) for key, value, seconds, step in points
        ]
        for first in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(run, metrics=metrics[first : first + _MLFLOW_BATCH])
        client.set_terminated(run, end_time=round(_ended(folder, name) * 1000))
    return address


def to_tensorboard(folder: Path, experiment: str, found: Sequence[Row], results: Results, keys: Sequence[str]) -> str:
    """Write runs to ``folder/tensorboard``, anew; takes what `to_mlflow` takes.

    Returns:
        The folder, which ``tensorboard --logdir`` takes.
    """
    from tensorboardX import SummaryWriter

    place = folder / "tensorboard"
    shutil.rmtree(place, ignore_errors=True)
    for row in found:
        name = row["name"]
        settings = {"variant": row["variant"], "seed": row["seed"], **{key: row[key] for key in keys}}
        reached = {key: row[key] for key in ("last", "best") if row[key] is not None}
        # Files are called after the second; the table of settings is a file of its own, and must not be this one.
        with SummaryWriter(str(place / name), filename_suffix=".rounds") as writer:
            for key, value, seconds, step in _points(results[name], _ended(folder, name)):
                writer.add_scalar(key, value, step, walltime=seconds)
            shown = {
                key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()
            }
            writer.add_hparams({"experiment": experiment, **shown}, reached, name=".")
    return str(place)


TRACKERS: Mapping[str, Callable[[Path, str, Sequence[Row], Results, Sequence[str]], str]] = {
    "mlflow": to_mlflow,
    "tensorboard": to_tensorboard,
}


def _points(result: Mapping[str, Any], ended: float) -> Iterator[tuple[str, float, float, int]]:
    """Name, value, wall-clock seconds and round of all that was measured."""
    now = ended - result["seconds"]
    for done in result["rounds"]:
        now += done["seconds"]
        counts = {key: done[key] for key in ("clients", "samples", "seconds", "bytes_up", "bytes_down")}
        for key, value in {**done["metrics"], **counts}.items():
            if value is not None:
                yield key, float(value), now, done["round"]


def _ended(folder: Path, name: str) -> float:
    return (folder / "runs" / name / "result.json").stat().st_mtime


def _mlflow_name(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./ -]", "_", key)
