"""What a memory budget buys, and costs: ``make bench-memory``.

ResNet-8 and the transformer, exported without a budget, with a half and with a quarter of what they need then, and with
a half by recomputation alone. Each bundle takes steps at batch 32 in a process of its own, whose resident memory grows
by what a step needs: that stands beside the plan. Results go to ``build/bench/memory.json``.
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cases import CASES, Case, export_case, write_samples
from federations import BUILD, ROOT, BenchError, command, machine, write_json

from edge_client import runtime
from edge_client.bundle import TRAIN, Bundle
from edge_client.graphs import aligned
from export.memory import format_size, parse_size

FOLDER = BUILD / "bench" / "memory"
RESULT = BUILD / "bench" / "memory.json"
VARIABLES = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
BATCH = 32
NEEDS = re.compile(r"a step needs (?P<size>\S+) at batch 32 beside the model(?P<how>.*)")


def measure(path: str, data: str, seconds: float) -> dict[str, float]:
    """Bytes by which resident memory grows when the first steps are taken, and the median time of a step."""
    runtime.spare_memory()
    bundle = Bundle.open(path)
    constants = {f"param.{name}": aligned(bundle.weights[name]) for name in bundle.manifest.constants[TRAIN]}
    session = runtime.session(bundle.train, constants=constants)
    with np.load(data) as arrays:
        given = {name: arrays[name][:BATCH] for name in ("x", "y")}
    given |= {f"param.{name}": aligned(weight) for name, weight in bundle.weights.items()}
    given |= {f"hyper.{hyper.name}": np.array(hyper.default, np.float32) for hyper in bundle.manifest.hypers}
    binding = session.io_binding()
    # The binding holds no reference; nothing is left for the first step to touch but what the runtime allocates.
    values = {value.name: runtime.shared(given[value.name].copy()) for value in session.get_inputs()}
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    results = {v.name: runtime.shared(np.ones(v.shape, kinds[v.type])) for v in session.get_outputs()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in results.items():
        binding.bind_ortvalue_output(name, value)
    process = psutil.Process()
    before = process.memory_info().rss
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        runtime.run(session, binding)
        times.append(time.perf_counter() - start)
    return {"resident_bytes": process.memory_info().rss - before, "step_ms": statistics.median(times[2:]) * 1e3}


def exported(case: Case, title: str, *options: str) -> tuple[Path, dict[str, Any]]:
    """A bundle with what the export says of its memory."""
    bundle = FOLDER / f"{title}.fedge"
    export_case(case, bundle, VARIABLES, *options)
    said = NEEDS.search(bundle.with_suffix(".export.txt").read_text())
    if said is None:
        raise BenchError(f"the export of {title} does not say what a step needs")
    return bundle, {"planned_bytes": parse_size(said["size"]), "how": said["how"].strip(", ")}


def exports(name: str, case: Case) -> list[tuple[str, str, tuple[Path, dict[str, Any]]]]:
    """Budget, its bytes and the bundle, for every budget that can be kept."""
    found = [("none", "", exported(case, name))]
    peak = found[0][2][1]["planned_bytes"]

    def attempt(budget: str, size: int, title: str, *options: str) -> None:
        try:
            found.append((budget, str(size), exported(case, title, *options, "--memory-budget", str(size))))
        except BenchError as error:
            print(f"{case.title}, budget {budget}: {error}", file=sys.stderr)

    attempt("half", peak // 2, f"{name}.half")
    attempt("quarter", peak // 4, f"{name}.quarter")
    if any(budget == "half" and "slices" in plan["how"] for budget, _, (_, plan) in found):
        # A slice as large as the batch leaves nothing but recomputation.
        attempt("half, recomputation alone", peak // 2, f"{name}.again", "--micro-batch", str(BATCH))
    return found


def run(names: list[str], seconds: float) -> list[dict[str, Any]]:
    """A row for each case and budget."""
    rows: list[dict[str, Any]] = []
    for name in names:
        case = CASES[name]
        FOLDER.mkdir(parents=True, exist_ok=True)
        data = FOLDER / f"{name}.npz"
        write_samples(case, data)
        variants = exports(name, case)
        for budget, size, (bundle, plan) in variants:
            program = [sys.executable, str(Path(__file__)), "--measure", str(bundle), str(data)]
            log = FOLDER / f"{bundle.stem}.steps.txt"
            said = command([*program, "--seconds", str(seconds)], log, variables=VARIABLES)
            found = json.loads(said.splitlines()[-1])
            row = {"model": name, "title": case.title, "budget": budget, "budget_bytes": int(size) if size else None}
            rows.append(row | plan | found)
            print(f"{case.title}, budget {budget}: {format_size(found['resident_bytes'])}", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["one step, batch 32", "budget", "planned", "resident growth", "step", "how"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        budget = format_size(row["budget_bytes"]) if row["budget_bytes"] else "none"
        sizes = [format_size(row["planned_bytes"]), format_size(row["resident_bytes"])]
        lines.append(
            [row["title"], budget, *sizes, f"{row['step_ms']:.1f} ms", row["how"] or "the whole batch at once"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["resnet8", "transformer"])
    parser.add_argument("--measure", nargs=2, metavar=("BUNDLE", "DATA"))
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given.seconds)))
        return
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"{unknown[0]!r} is no case; there are {', '.join(CASES)}")
    rows = run(given.cases, given.seconds)
    write_json(RESULT, {"machine": machine(), "cases": rows})
    RESULT.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
