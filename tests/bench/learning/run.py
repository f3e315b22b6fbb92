"""One trial: ``python -m tests.bench.learning.run trial.json out.json``, as `trials.Bench` starts it."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from broker_server.cli import results
from broker_server.config import load
from broker_server.records import Round
from broker_server.simulation import simulate
from tests.bench.federations import write_json


def run(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the trial's federation in ``folder``, and one round more where it has ``final`` settings."""
    trial = given["trial"]
    file = folder / "federation.toml"
    file.write_text('[federation]\nname = "bench"\nbundle = ""\n')
    common = {
        "federation.bundle": given["bundle"],
        "broker.kind": "mosquitto",
        "simulation.data": given["train"],
        "simulation.slots": 1,
        "evaluation.data": given["test"],
        **trial["settings"],
    }
    phases = [common]
    if trial["final"]:
        phases.append(common | {"stop.rounds": common["stop.rounds"] + 1} | trial["final"])
    found: dict[str, Any] = {}
    for settings in phases:
        part = _phase(file, settings, trial["fleet"])
        earlier = found.get("seconds", 0.0)
        part["stamps"] = found.get("stamps", []) + [earlier + stamp for stamp in part["stamps"]]
        part["rounds"] = found.get("rounds", []) + part["rounds"]
        for key in ("bytes_up", "bytes_down", "seconds"):
            part[key] += found.get(key, 0)
        found = part
    return found


def _phase(file: Path, settings: dict[str, Any], fleet: str) -> dict[str, Any]:
    stamps: list[float] = []
    started = time.monotonic()

    def finished(_: Round) -> None:
        stamps.append(time.monotonic() - started)

    done = asyncio.run(simulate(load(file, settings), lambda line: print(line, flush=True), finished, fleet=fleet))
    kept = ("rounds", "reason", "seconds", "bytes_up", "bytes_down", "peak_rss_mib")
    plain: dict[str, Any] = json.loads(json.dumps({key: value for key, value in results(done).items() if key in kept}))
    return plain | {"stamps": stamps}


if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    write_json(out, run(json.loads(source.read_text()), source.parent))
