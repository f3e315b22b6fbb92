"""Where a step's time goes, by operator and by node: python tests/bench/profiles.py CASE ... [--threads 1]

Profiles the bundles that ``make bench-training`` has left in ``build/bench/training``, as a device trains; one text
for each case goes to ``build/bench/profiles``. Profiling itself costs a few microseconds a node.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort
from cases import CASES
from federations import BUILD

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan

FOLDER = BUILD / "bench" / "training"
BATCH, WARMUP, STEPS = 32, 5, 20


@contextmanager
def profiling(prefix: str, made: list[ort.InferenceSession]) -> Iterator[None]:
    """Profile the sessions that are made from here on, with the settings that they are made with; collect them."""
    options, session = ort.SessionOptions, ort.InferenceSession

    def profiled() -> ort.SessionOptions:
        fresh = options()
        fresh.enable_profiling = True
        fresh.profile_file_prefix = prefix
        return fresh

    def collected(*args: Any, **kwargs: Any) -> ort.InferenceSession:
        made.append(session(*args, **kwargs))
        return made[-1]

    with mock.patch.object(ort, "SessionOptions", profiled), mock.patch.object(ort, "InferenceSession", collected):
        yield


def profile(name: str, threads: int) -> list[list[dict[str, Any]]]:
    """The kernels' events of each timed step, in order of their time."""
    bundle = Bundle.open(FOLDER / f"{name}.fedge")
    with np.load(FOLDER / f"{name}.npz") as arrays:
        source = ArraySource(dict(arrays))
    made: list[ort.InferenceSession] = []
    with tempfile.TemporaryDirectory() as place, profiling(str(Path(place) / "profile"), made):
        trainer, plan = Trainer(bundle, threads=threads), TrainPlan(steps=WARMUP + STEPS, batch_size=BATCH)
        trainer.train(bundle.initial(), source, plan, seed=0)
        (session,) = made
        events = json.loads(Path(session.end_profiling()).read_text())
    steps: list[list[dict[str, Any]]] = []
    current: list[dict[str, Any]] = []
    for event in sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"] + e["dur"]):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            # Their time is that of the nodes inside, which have events of their own.
            if event["args"]["op_name"] in ("If", "Loop", "Scan"):
                continue
            current.append(event)
        elif event["name"] == "model_run":
            steps.append(current)
            current = []
    return steps[WARMUP:]


def report(name: str, threads: int) -> str:
    """A text: milliseconds of each operator type, then of the slowest nodes with their shapes."""
    steps = profile(name, threads)
    nodes: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, str]] = {}
    for step in steps:
        for event in step:
            args = event["args"]
            nodes[event["name"]].append(event["dur"] / 1e3)
            shapes = " ".join(str(next(iter(one.values()))) for one in args.get("input_type_shape", []))
            made = " ".join(str(next(iter(one.values()))) for one in args.get("output_type_shape", []))
            about[event["name"]] = (args["op_name"], f"{shapes} -> {made}")
    times = {node: statistics.median(found) for node, found in nodes.items()}
    kinds: dict[str, list[float]] = defaultdict(list)
    for node, time in times.items():
        kinds[about[node][0]].append(time)
    total = sum(times.values())
    lines = [f"{CASES[name].title}, {threads} threads, batch {BATCH}: {total:.3f} ms in {len(times)} nodes", ""]
    for kind, found in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(found):9.3f} ms {sum(found) / total:6.1%}  {len(found):4d} x {kind}")
    lines.append("")
    for node in sorted(times, key=lambda node: -times[node])[:40]:
        kind, shapes = about[node]
        lines.append(f"{times[node]:9.3f} ms  {kind:18} {node.removesuffix('_kernel_time'):40} {shapes}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=BUILD / "bench" / "profiles")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.cases:
        text = report(name, given.threads)
        (given.out / f"{name}.txt").write_text(text)
        print(text.partition("\n")[0])


if __name__ == "__main__":
    main()
