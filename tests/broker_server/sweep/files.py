"""A federation's files for sweeps of it, and a program that stands for ``fedge simulate``."""

import json
import sys
from pathlib import Path

import numpy as np

from tests.toy import toy_bundle, toy_data

TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"

[round]
cohort = 2

[transfer]
spread = 0.0

[stop]
rounds = 2

[simulation]
clients = 4
data = "data.npz"
test_fraction = 0.25
"""

# It tells a journal that it ran; its accuracy is its learning rate. One with momentum waits to be ended, and holds a
# pipe meanwhile; one with weight decay fails.
FAKE = """
import json, os, signal, sys, tomllib
from pathlib import Path
file, out = map(Path, sys.argv[1:])
settings = tomllib.loads(file.read_text())
hypers, sweep = settings["train"]["hypers"], file.parents[2]
with (sweep / "journal").open("a") as journal:
    journal.write(file.parent.name + "\\n")
Path(settings["federation"]["state"]).mkdir()
if hypers.get("momentum"):
    out.write_text("{")
    pipe = os.open(sweep / "pipe", os.O_WRONLY)
    os.write(pipe, b"!")
    signal.pause()
if hypers.get("weight_decay"):
    sys.exit("round 1\\nfedge: the model is not a number")
done = {"round": 1, "clients": 2, "samples": 20, "seconds": 0.5, "bytes_up": 10, "bytes_down": 20}
done["metrics"] = {"accuracy": hypers["lr"], "loss": None}
out.write_text(json.dumps({"rounds": [done], "seconds": 1.0, "bytes_up": 11, "bytes_down": 22}))
"""


def federation(folder: Path) -> Path:
    (folder / "toy.fedge").write_bytes(toy_bundle(momentum=True))
    np.savez(folder / "data.npz", **toy_data(200))
    file = folder / "federation.toml"
    file.write_text(TOML)
    return file


def fake(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", FAKE, str(file), str(out)]


def journal(folder: Path) -> list[str]:
    """The runs that were started, in order."""
    path = folder / "journal"
    return path.read_text().split() if path.exists() else []


def result(*rounds: tuple[dict[str, float | None], int, int, float]) -> dict:
    """As ``fedge simulate --json`` writes it: metrics, bytes up and down, seconds of each round."""
    done = [
        {"round": n, "clients": 2, "samples": 9, "metrics": m, "bytes_up": up, "bytes_down": down, "seconds": s}
        for n, (m, up, down, s) in enumerate(rounds, 1)
    ]
    return json.loads(json.dumps({"rounds": done, "seconds": 9.0, "bytes_up": 100, "bytes_down": 200}))
