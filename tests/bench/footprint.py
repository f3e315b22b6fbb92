"""What the McMahan CNN takes beside time: peak memory, the way to a first step, and the place on disk."""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, export_case
from federations import FEDGE, ROOT, BenchError, command, toml

HERE = Path(__file__).parent
SAMPLES = 600
"""A client's share of Fashion-MNIST among 100; its 19 steps make one epoch."""
ROUNDS = 2
CASE = CASES["cnn"]


@dataclass(frozen=True)
class Place:
    """Where files go, and the environment of every process."""

    folder: Path
    variables: dict[str, str]

    @property
    def samples(self) -> Path:
        """``x [600, 1, 28, 28] uint8``, ``y``: as a device would keep images."""
        return self.folder / "images.npz"

    @property
    def bundle(self) -> Path:
        """The exported model; pixels are scaled on the device."""
        return self.folder / "images.fedge"

    @property
    def torch(self) -> list[str]:
        """The plain PyTorch script on the same model and images."""
        return [sys.executable, str(HERE / "step_torch.py"), CASE.factory, str(self.samples)]

    @property
    def fedge(self) -> list[str]:
        """Training of the bundle on the same images, without a federation."""
        return [sys.executable, str(HERE / "step_fedge.py"), str(self.bundle), str(self.samples)]


def prepare(place: Place) -> dict[str, Any]:
    """Write the samples and the bundle."""
    place.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (SAMPLES, *CASE.shape), np.uint8)
    np.savez(place.samples, x=x, y=rng.integers(0, CASE.classes, SAMPLES))
    export_case(CASE, place.bundle, place.variables, "--scale", str(1 / 255))
    return {"bytes": place.bundle.stat().st_size}


def memory(place: Place) -> dict[str, Any]:
    """Peak resident memory of a real ``fedge join`` in a federation of one, beside the plain script; one thread each.

    The server with its embedded broker runs in other processes and does not count.
    """
    folder = place.folder / "join"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port = _free_port()
    sections: dict[str, dict[str, object]] = {
        "federation": {"name": "bench", "bundle": str(place.bundle)},
        "broker": {"port": port},
        "round": {"cohort": 1},
        "train": {"batch_size": 32},
        "stop": {"rounds": ROUNDS},
    }
    (folder / "federation.toml").write_text(toml(sections))
    with (folder / "serve.txt").open("w") as log:
        server = subprocess.Popen(
            [str(FEDGE), "serve", "federation.toml"],
            cwd=folder,
            env=os.environ | place.variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"mqtt://127.0.0.1:{port}/bench"
        client = [str(FEDGE), "join", url, "--id", "one", "--data", str(place.samples), "--state", "one", "--once"]
        ours = _peak(client, folder / "join.txt", place.variables)
        server.wait(60)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"fedge serve did not end by itself; what it said is in {folder / 'serve.txt'}") from error
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
    steps = ROUNDS * -(-SAMPLES // 32)
    theirs = _peak([*place.torch, "--steps", str(steps)], folder / "torch.txt", place.variables)
    return {"rss_bytes": ours, "torch_rss_bytes": theirs, "rss_ratio": ours / theirs}


def cold_start(place: Place, pairs: int) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first optimizer step; one pair before warms the disk."""

    def seconds(program: list[str], name: str) -> float:
        log = place.folder / "log" / f"start.{name}.txt"
        start = time.monotonic()
        said = command([*program, "--steps", "1"], log, variables=place.variables)
        finished: float = json.loads(said.splitlines()[-1])["finished"]
        return finished - start

    contenders: dict[str, Callable[[], float]] = {
        "fedge": lambda: seconds(place.fedge, "fedge"),
        "torch": lambda: seconds(place.torch, "torch"),
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(pairs + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            found[name].append(contenders[name]())
    ours, theirs = found["fedge"][1:], found["torch"][1:]
    return {
        "cold_start_s": statistics.median(ours),
        "torch_cold_start_s": statistics.median(theirs),
        "cold_start_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def install(place: Place) -> dict[str, Any]:
    """Bytes that ``pip install`` adds to a new environment: fedge's base, and PyTorch with numpy."""
    with tempfile.TemporaryDirectory(prefix="fedge-install-") as name:
        folder = Path(name)
        # Built from a copy: setuptools leaves files in the tree, and would pack what an older build left there.
        source = folder / "source"
        for package in ("edge_client", "broker_server", "export"):
            shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        logs = place.folder / "log"
        ours = _installed(folder / "fedge", [str(source)], logs / "install.fedge.txt")
        theirs = _installed(folder / "torch", ["torch", "numpy"], logs / "install.torch.txt")
    return {"install_bytes": ours, "torch_install_bytes": theirs, "install_ratio": ours / theirs}


def _installed(folder: Path, packages: list[str], log: Path) -> int:
    command([sys.executable, "-m", "venv", str(folder)], log)
    before = _size(folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-c", str(ROOT / "constraints.txt")]
    command([*pip, *packages], log, timeout=1200.0)
    return _size(folder) - before


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _peak(program: list[str], log: Path, variables: dict[str, str]) -> int:
    out = log.with_suffix(".peak")
    command([sys.executable, "-I", str(HERE / "peak.py"), str(out), *program], log, variables=variables)
    return int(out.read_text())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
