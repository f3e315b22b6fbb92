"""Bundles run on the least onnxruntime that their manifest names, and come to what the installed one comes to."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_client import runtime
from export.bundle import LEAST_RUNTIME, export_bundle
from export.lora import Lora
from export.models.digits import digits_cnn
from export.models.shakespeare import char_gru

RUN = """
import sys
import numpy as np
from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.graphs import aligned
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan

for path in sys.argv[1:]:
    bundle = Bundle.open(path)
    rng = np.random.default_rng(0)
    data = {}
    for feature in (*bundle.manifest.inputs, *bundle.manifest.targets):
        shape = (24, *feature.shape)
        whole = feature.dtype == "int64"
        data[feature.name] = rng.integers(0, 3, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    trainer, source = Trainer(bundle), ArraySource(data)
    result = trainer.train(bundle.initial(), source, TrainPlan(epochs=2, batch_size=10), seed=1)
    sums = trainer.evaluate(result.local, source, buffers=result.buffers)
    constants = {f"param.{n}": aligned(bundle.weights[n]) for n in bundle.manifest.constants["infer.onnx"]}
    feeds = {f.name: data[f.name] for f in bundle.manifest.inputs}
    outputs = runtime.session(bundle.infer, constants=constants).run(None, feeds)
    found = np.concatenate([result.local, result.buffers, [sums["loss"]], *(o.ravel() for o in outputs)])
    np.save(f"{path}.{runtime.VERSION}.npy", found)
print(runtime.VERSION)
"""


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(128, 3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that onnxruntime; what it needs besides is here already."""
    folder = tmp_path_factory.mktemp("least")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", f"onnxruntime=={LEAST_RUNTIME}.*"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"onnxruntime {LEAST_RUNTIME} cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def ran(folder: Path | None, paths: list[Path]) -> str:
    places = [str(folder)] if folder else []
    here = str(Path(__file__).parents[2])
    environment = {"PYTHONPATH": ":".join([*places, here]), "ORT_DISABLE_TELEMETRY": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_exports_train_evaluate_and_infer_on_the_least_runtime(least: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    image, text = [((1, 8, 8), "float32")], [((6,), "int64")]
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    cases = {
        "sgd": (digits_cnn(), image, {}),
        "buffers": (batch_norm_cnn(), image, {"optimizer": "adamw", "clip": 1.0, "proximal": True, "control": True}),
        "frozen": (digits_cnn(), image, {"last": 2, "optimizer": "nesterov"}),
        "gru": (char_gru(vocabulary=5, hidden=8), text, {"optimizer": "adam"}),
        "lora": (nn.Sequential(nn.Embedding(5, 8), layer, nn.Linear(8, 5)), text, {"lora": Lora(rank=2)}),
    }
    paths = []
    for name, (module, inputs, options) in cases.items():
        paths.append(tmp_path / f"{name}.fedge")
        export_bundle(module, paths[-1], name=name, inputs=inputs, **options)
    version = ran(least, paths)
    assert version.startswith(f"{LEAST_RUNTIME}.")
    assert ran(None, paths) == runtime.VERSION
    for path in paths:
        old, new = (np.load(f"{path}.{v}.npy") for v in (version, runtime.VERSION))
        np.testing.assert_allclose(old, new, rtol=1e-3, atol=1e-4, err_msg=path.name)
