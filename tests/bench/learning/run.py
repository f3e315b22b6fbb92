"""One trial, as `trials.Bench` starts it: ``run.py FEDERATION.toml BESIDE.json OUT.json``."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from broker_server.cli import results
from broker_server.config import Federation, load
from broker_server.records import Round
from broker_server.simulation import simulate
from tests.bench.federations import write_json

KEPT = ("rounds", "reason", "seconds", "bytes_up", "bytes_down", "peak_rss_mib")


def run(file: Path, beside: dict[str, Any]) -> dict[str, Any]:
    """Run the federation, and one round more where there are ``final`` settings."""
    os.environ |= beside["variables"]
    settings = load(file)
    found = _phase(settings, beside["fleet"])
    if beside["final"]:
        more = load(file, {"stop.rounds": settings.stop.rounds + 1, **beside["final"]})
        last = _phase(more, beside["fleet"])
        last["stamps"] = [found["seconds"] + stamp for stamp in last["stamps"]]
        for key in ("rounds", "stamps", "seconds", "bytes_up", "bytes_down"):
            found[key] += last[key]
    return found | {"beside": beside}


def _phase(settings: Federation, fleet: str) -> dict[str, Any]:
    stamps: list[float] = []
    started = time.monotonic()

    def finished(_: Round) -> None:
        stamps.append(time.monotonic() - started)

    done = asyncio.run(simulate(settings, lambda line: print(line, flush=True), finished, fleet=fleet))
    plain: dict[str, Any] = {key: value for key, value in results(done).items() if key in KEPT}
    return plain | {"stamps": stamps}


if __name__ == "__main__":
    source, more, out = map(Path, sys.argv[1:])
    write_json(out, run(source, json.loads(more.read_text())))
