"""The federations of the benchmarks: their data, their bundle, their file, and a run of ``fedge simulate``."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("FEDGE_BUILD", ROOT / "build"))
ROUNDS = int(os.environ.get("FEDGE_ROUNDS", "0"))
"""Rounds of each run, where a test wants a short one; 0 leaves them as they are."""
FEDGE = Path(sys.executable).with_name("fedge")

Sections = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Run:
    """One federation: what is trained, on which data, by whom."""

    data: str
    """A data set of tests/datasets.py."""
    model: tuple[str, ...]
    """Arguments of ``fedge export``."""
    clients: int
    rounds: int
    sections: Sections = field(default_factory=dict)
    """Sections of the federation file beside the paths."""


PIXELS = ("--input", "1,28,28", "--scale", str(1 / 255))
LABEL_SKEW = {"split": "dirichlet", "alpha": 0.3}

RUNS = {
    "fashion-mnist": Run(
        "fashion-mnist",
        ("export.models.mcmahan:mnist_cnn", *PIXELS),
        clients=100,
        rounds=30,
        sections={
            "round": {"cohort": 10, "deadline": 300.0},
            "train": {"batch_size": 32},
            "train.hypers": {"lr": 0.05},
            "simulation": LABEL_SKEW,
        },
    ),
    "mnist-writers": Run(
        "mnist-writers",
        ("export.models.mcmahan:mnist_2nn", *PIXELS),
        clients=539,
        rounds=50,
        sections={
            "round": {"cohort": 50, "deadline": 300.0},
            "train": {"batch_size": 10},
            "train.hypers": {"lr": 0.1},
            "simulation": {"split": "natural", "key": "user"},
        },
    ),
    "shakespeare": Run(
        "shakespeare",
        ("export.models.shakespeare:char_gru", "--input", "40", "--input-dtype", "int64"),
        clients=141,
        rounds=50,
        sections={
            "round": {"cohort": 10, "deadline": 600.0},
            "train": {"batch_size": 10},
            "train.hypers": {"lr": 2.0},
            "simulation": {"split": "natural", "key": "user"},
        },
    ),
    "logistic": Run(
        "fashion-mnist",
        ("export.models.logistic:logistic_regression", *PIXELS),
        clients=1000,
        rounds=30,
        sections={
            "round": {"cohort": 10, "deadline": 60.0},
            "train": {"batch_size": 32},
            "train.hypers": {"lr": 0.05},
            "simulation": LABEL_SKEW,
        },
    ),
}


class BenchError(Exception):
    """A benchmark cannot go on: its message says which command failed and where its output is."""


def data(run: Run) -> tuple[Path, Path]:
    """The run's ``train.npz`` and ``test.npz``."""
    folder = BUILD / "data" / run.data
    train, test = folder / "train.npz", folder / "test.npz"
    if not (train.exists() and test.exists()):
        command([sys.executable, str(ROOT / "tests" / "datasets.py"), run.data, str(folder)], folder / "log.txt")
    return train, test


def export(run: Run, folder: Path) -> Path:
    """Export the run's model afresh, as an older export may be another one."""
    path = folder / "model.fedge"
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command(
        [str(FEDGE), "export", *run.model, "--loss", "cross_entropy", "--optimizer", "sgd", "-o", str(path)],
        folder / "export.txt",
    )
    return path


def simulate(run: Run, folder: Path, *, bundle: Path, settings: Sections, timeout: float) -> dict[str, Any]:
    """Run a federation from nothing on mosquitto.

    Args:
        run: what is trained.
        folder: where its file, state and log go; emptied first.
        bundle: the exported model.
        settings: sections that add to the run's and replace what they name.
        timeout: seconds after which it counts as stuck.

    Returns:
        What ``fedge simulate --json`` writes: ``rounds``, ``bytes_up`` and ``bytes_down`` of the whole run as the
        phones' transports counted them, and ``peak_rss_mib`` of server and phones together.

    Raises:
        BenchError: it failed, or fewer updates were counted than asked for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    train, _ = data(run)
    sections: dict[str, dict[str, object]] = {
        "federation": {"name": "bench", "bundle": str(bundle), "seed": 0},
        "broker": {"kind": "mosquitto"},
        "simulation": {"clients": run.clients, "data": str(train)},
    }
    for more in (run.sections, settings):
        for name, values in more.items():
            sections[name] = sections.get(name, {}) | dict(values)
    (folder / "federation.toml").write_text(toml(sections))
    out = folder / "out.json"
    command(
        [str(FEDGE), "simulate", "federation.toml", "--clients", str(run.clients), "--json", str(out)],
        folder / "log.txt",
        timeout=timeout,
    )
    result: dict[str, Any] = json.loads(out.read_text())
    wanted = sections["round"]["cohort"]
    short = [row["round"] for row in result["rounds"] if row["clients"] != wanted]
    if short or not result["rounds"]:
        raise BenchError(f"rounds {short} of {folder} counted other than {wanted} updates: not a fair round")
    return result


def toml(sections: Sections) -> str:
    """Sections as TOML; numbers, texts and booleans look in it as they do in JSON."""

    def written(value: object) -> str:
        if isinstance(value, Mapping):
            return "{ " + ", ".join(f"{key} = {written(inner)}" for key, inner in value.items()) + " }"
        return json.dumps(value)

    return "\n\n".join(
        "\n".join([f"[{name}]", *(f"{key} = {written(value)}" for key, value in values.items())])
        for name, values in sections.items()
    )


def command(
    arguments: list[str], log: Path, *, timeout: float = 600.0, variables: Mapping[str, str] | None = None
) -> str:
    """Run a program in the log's folder, keep what it says in the log, and return its standard output.

    ``variables`` are added to its environment.

    Raises:
        BenchError: it failed or took longer than ``timeout`` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(variables or {})
    # A session of its own: what it started ends with it, also when it is stuck.
    process = subprocess.Popen(
        arguments,
        cwd=log.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaints = process.communicate(timeout=timeout)
        ending = f"ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        ending = f"took more than {timeout:.0f} s"
        os.killpg(process.pid, 9)
        said, complaints = process.communicate()
    except BaseException:
        os.killpg(process.pid, 15)
        process.wait()
        raise
    log.write_text(said + complaints)
    if process.returncode:
        last = (complaints.strip() or said.strip()).splitlines()[-1:]
        raise BenchError(f"{' '.join(arguments)} {ending}: {''.join(last)} (all it said: {log})")
    return said


def machine() -> dict[str, object]:
    """What a measurement was made on."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fedge", "onnxruntime", "torch", "numpy", "paho-mqtt")},
        "mosquitto": mosquitto_version(),
        "commit": commit.stdout.strip(),
    }


def mosquitto_version() -> str:
    """The broker's version line; empty when there is no mosquitto."""
    program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        return ""
    said = subprocess.run([program, "-h"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else ""


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
