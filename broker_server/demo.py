"""The main job in one command: export a model, train it on emulated phones, show what came of it."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from broker_server.config import load
from broker_server.report import human_bytes, plot_run, table
from broker_server.simulation import simulate
from edge_client.bundle import Bundle
from edge_client.errors import FedgeError

CLIENTS = 20
TARGET = 0.95
FEWER_UP, FEWER_DOWN = 10, 3
"""How many times fewer bytes than fp32 FedAvg the demo stands for."""
_FEDERATION = f"""\
[federation]
name = "digits"
bundle = "digits.fedge"
state = "state"
seed = 7

[round]
cohort = 10
deadline = 30.0

[train]
epochs = 5
batch_size = 16

[train.hypers]
lr = 0.3

[codec]
target = "step"
value = 2.0

[evaluation]
data = "test.npz"

[stop]
rounds = 40
metric = "accuracy"

[simulation]
clients = {CLIENTS}
data = "train.npz"
split = "dirichlet"
alpha = 0.3
"""


def run_demo(output: Path, console: Console) -> None:
    """Train the digits CNN on emulated phones with a label-skewed split; write the results to ``output``.

    Raises:
        FedgeError: a step failed, or the accuracy or the bytes are not what the demo stands for.
    """
    from broker_server.cli import progress

    started = time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    _write_digits(output)
    console.print("exporting the digits CNN: forward, loss, backward and SGD in one ONNX graph")
    _export(output / "digits.fedge")
    path = output / "federation.toml"
    path.write_text(_FEDERATION, encoding="utf-8")
    settings = load(path)
    with progress(settings, console) as bar:
        result = asyncio.run(simulate(settings, console.print, bar))
    seconds = time.monotonic() - started

    bundle = Bundle.open(output / "digits.fedge")
    counted = sum(done.clients for done in result.rounds)
    plain = 4 * bundle.layout.size * counted
    accuracy = result.rounds[-1].metrics["accuracy"]
    summary = {
        "accuracy": accuracy,
        "rounds": len(result.rounds),
        "seconds": round(seconds, 2),
        "clients": result.fleet.clients,
        "bytes_up": result.fleet.sent,
        "bytes_down": result.fleet.received,
        "fp32_bytes_up": plain,
        "fp32_bytes_down": plain,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.copytree(output / "state" / "models", output / "models")
    plot_run(
        result.rounds,
        output / "run.png",
        fp32_bytes_up=plain,
        fp32_bytes_down=plain,
        target=TARGET,
        title=f"Handwritten digits on {CLIENTS} emulated phones",
    )
    console.print(table(result.rounds, title="digits"))
    up, down = plain / result.fleet.sent, plain / result.fleet.received
    console.print(
        f"accuracy {accuracy:.4f} after {len(result.rounds)} rounds and {seconds:.0f} s; "
        f"{human_bytes(result.fleet.sent)} up, {up:.0f} times less than fp32 FedAvg; "
        f"{human_bytes(result.fleet.received)} down (the bundle for each phone included), {down:.1f} times less"
    )
    console.print(f"results: {output}/summary.json, {output}/run.png, {output}/models")
    if accuracy < TARGET:
        raise FedgeError(f"the demo reached an accuracy of {accuracy:.4f}; expected {TARGET} or more")
    if up < FEWER_UP or down < FEWER_DOWN:
        raise FedgeError(
            f"the demo took {up:.1f} times fewer bytes up and {down:.1f} down than fp32 FedAvg; "
            f"expected at least {FEWER_UP} and {FEWER_DOWN}"
        )


def _write_digits(output: Path) -> None:
    """scikit-learn's digits: 1,797 real 8x8 images (UCI Optical Recognition of Handwritten Digits, Alpaydin 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images[order].astype(np.uint8)[:, None]
    labels = digits.target[order].astype(np.int64)
    cut = len(labels) // 5
    np.savez(output / "test.npz", x=images[:cut], y=labels[:cut])
    np.savez(output / "train.npz", x=images[cut:], y=labels[cut:])


def _export(path: Path) -> None:
    """Through the command, as a user would: the server's room does not import the export's."""
    command = [sys.executable, "-m", "edge_client.cli", "export", "export.models.digits:digits_cnn"]
    command += [
        "--input",
        "1,8,8",
        "--scale",
        str(1 / 16),
        "--loss",
        "cross_entropy",
        "--optimizer",
        "sgd",
        "--no-tune",
    ]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or ["no word"]
        raise FedgeError(f"the export failed: {words[-1].removeprefix('fedge: ')}")
