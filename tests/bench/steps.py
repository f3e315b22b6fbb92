"""Step times: fedge on ONNX Runtime against PyTorch eager, one thread each, in separate processes that alternate.

``python tests/bench/steps.py [MODEL ...] [--pairs N]`` prints the medians and the median of the paired ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 32
MODELS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "logistic": ("export.models.logistic:logistic_regression", (1, 28, 28), "float32"),
    "2nn": ("export.models.mcmahan:mnist_2nn", (1, 28, 28), "float32"),
    "cnn": ("export.models.mcmahan:mnist_cnn", (1, 28, 28), "float32"),
    "digits": ("export.models.digits:digits_cnn", (1, 8, 8), "float32"),
    "gru": ("export.models.shakespeare:char_gru", (40,), "int64"),
}


def measured(step: Callable[[], object], seconds: float = 1.5) -> float:
    """Median milliseconds of a call."""
    for _ in range(5):
        step()
    times = []
    while sum(times) < seconds or len(times) < 10:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def run_torch(model: str) -> float:
    import torch
    import torch.nn.functional as F

    from export.cli import load_module

    torch.set_num_threads(1)
    factory, shape, dtype = MODELS[model]
    module = load_module(factory)
    x = torch.rand(BATCH, *shape) if dtype == "float32" else torch.randint(0, 60, (BATCH, *shape))
    with torch.no_grad():
        classes = module(x).shape
    y = torch.randint(0, classes[-1], classes[:-1])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(x).reshape(-1, classes[-1]), y.reshape(-1)).backward()
        optimizer.step()

    return measured(step)


def run_fedge(model: str, path: str) -> float:
    import zipfile

    import msgspec
    import numpy as np
    from safetensors.numpy import load

    from edge_client import runtime
    from edge_client.manifest import Manifest

    with zipfile.ZipFile(path) as archive:
        manifest = msgspec.json.decode(archive.read("manifest.json"), type=Manifest)
        weights = load(archive.read("weights.safetensors"))
        session = runtime.session(archive.read("train.onnx"))
    rng = np.random.default_rng(0)
    batch = {}
    for feature in (*manifest.inputs, *manifest.targets):
        size = (BATCH, *feature.shape)
        batch[feature.name] = rng.random(size, np.float32) if feature.dtype == "float32" else rng.integers(0, 10, size)
    buffers = [{n: runtime.shared(w.copy()) for n, w in weights.items()} for _ in range(2)]
    bindings = []
    for read, write in (buffers, buffers[::-1]):
        binding = session.io_binding()
        for hyper in manifest.hypers:
            binding.bind_ortvalue_input(f"hyper.{hyper.name}", runtime.shared(np.array(hyper.default, np.float32)))
        for name, array in batch.items():
            binding.bind_ortvalue_input(name, runtime.shared(array))
        for name, value in read.items():
            binding.bind_ortvalue_input(f"param.{name}", value)
            binding.bind_ortvalue_output(f"next.{name}", write[name])
        for name in ("loss", "sum.count", *(f"sum.{metric}" for metric in manifest.metrics)):
            binding.bind_ortvalue_output(name, runtime.shared(np.zeros((), np.float32)))
        bindings.append(binding)

    def step() -> None:
        bindings.reverse()
        session.run_with_iobinding(bindings[0])

    return measured(step)


def compare(model: str, pairs: int) -> dict[str, object]:
    """Export, then time both sides in turn."""
    from export.bundle import export_bundle
    from export.cli import load_module

    factory, shape, dtype = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fedge"
        seconds = export_bundle(load_module(factory), path, name=model, inputs=[(shape, dtype)]).seconds
        ours, theirs = [], []
        for _ in range(pairs):
            theirs.append(_child("torch", model, ""))
            ours.append(_child("fedge", model, str(path)))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "model": model,
        "step_ms": round(statistics.median(ours), 3),
        "torch_step_ms": round(statistics.median(theirs), 3),
        "ratio": round(ratio, 3),
        "best_ratio": round(min(ours) / min(theirs), 3),
        "export_seconds": round(seconds, 1),
    }


def _child(side: str, model: str, path: str) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--side", side, model, "--path", path]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=["torch", "fedge"])
    parser.add_argument("--path", default="")
    given = parser.parse_args()
    if given.side is not None:
        model = given.models[0]
        print(run_torch(model) if given.side == "torch" else run_fedge(model, given.path))
        return
    for model in given.models:
        print(json.dumps(compare(model, given.pairs)), flush=True)


if __name__ == "__main__":
    main()
