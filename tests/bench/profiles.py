"""Where a step's time goes, by operator and by node: python tests/bench/profiles.py CASE ... [--threads 1]

Profiles the bundles that ``make bench-training`` has left in ``build/bench/training``, set up as on a device; one text
for each case goes to ``build/bench/profiles``. Profiling itself costs a few microseconds a node.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from cases import CASES
from federations import BUILD

from edge_client.bundle import Bundle

FOLDER = BUILD / "bench" / "training"
BATCH, WARMUP, STEPS = 32, 5, 20


def profile(name: str, threads: int) -> list[list[dict[str, Any]]]:
    """The kernels' events of each timed step, in order of their time."""
    bundle = Bundle.open(FOLDER / f"{name}.fedge")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    frozen = {
        f"param.{p.name}": bundle.weights[p.name].copy() for p in bundle.manifest.parameters if p.role == "frozen"
    }
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in frozen.items()}
    for key, value in values.items():
        options.add_initializer(key, value)
    with tempfile.TemporaryDirectory() as place:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(place) / "profile")
        session = ort.InferenceSession(bundle.train, options, providers=["CPUExecutionProvider"])
        with np.load(FOLDER / f"{name}.npz") as arrays:
            given: dict[str, Any] = {key: arrays[key][:BATCH] for key in ("x", "y")}
        given |= {f"param.{key}": np.array(value) for key, value in bundle.weights.items()}
        given |= {f"hyper.{key}": np.array(value, np.float32) for key, value in bundle.manifest.defaults().items()}
        wanted = {value.name for value in session.get_inputs()}
        given = {key: value for key, value in given.items() if key in wanted}
        for _ in range(WARMUP + STEPS):
            session.run(None, given)
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
