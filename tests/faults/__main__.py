"""Simulate federations under faults and write what came of it: ``make simulate-faults``.

Seeds are fresh unless ``--first`` names one, and printed. A run that breaks an invariant is made small and its trace
printed, and the command fails. Results go to ``build/bench/faults.json``.
"""

import argparse
import json
import os
import secrets
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.mutations import MUTATIONS, caught
from tests.faults.plans import Plan, either
from tests.faults.run import run
from tests.faults.shrink import shrink

RESULT = Path(__file__).parents[2] / "build" / "bench" / "faults.json"
SEEDS_OF_A_MUTATION = 150
SIGNED = 4
"""Every so many federations sign what they say, over a broker that tampers with it."""


def main() -> int:
    """Simulate and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FEDGE_FAULTS_SECONDS", "3600")))
    parser.add_argument("--federations", type=int, default=0, help="end after so many; 0: when the seconds are over")
    parser.add_argument("--first", type=int, default=None, help="the first seed")
    parser.add_argument("--size", choices=["small", "mixed"], default="mixed")
    parser.add_argument("--trace", action="store_true", help="print the trace of the first seed, and end")
    arguments = parser.parse_args()
    first = secrets.randbits(40) if arguments.first is None else arguments.first
    if arguments.trace:
        result = run(either(first, arguments.size), trace=True)
        print("\n".join(result.trace))
        return int(result.violation is not None)
    print(f"seeds from {first}, for {arguments.seconds:.0f} s of this processor", flush=True)
    faults: Counter[str] = Counter()
    signing = 0
    failures: list[dict[str, Any]] = []
    federations = rounds = lost = doubled = 0
    virtual, began = 0.0, time.process_time()
    while time.process_time() - began < arguments.seconds and federations != (arguments.federations or -1):
        seed = first + federations
        signed = federations % SIGNED == SIGNED - 1
        result = run(either(seed, arguments.size), **lies(signed))
        federations, signing = federations + 1, signing + signed
        rounds, virtual = rounds + result.rounds, virtual + result.seconds
        lost, doubled = lost + result.lost, doubled + result.doubled
        faults += result.faults
        if result.violation is not None:
            print(f"seed {seed}: {result.violation!r}", flush=True)
            failures.append({"seed": seed, "signed": signed, "violation": repr(result.violation)})
    seconds = time.process_time() - began
    if failures:
        explain(either(failures[0]["seed"], arguments.size), failures[0]["signed"])
    found = {}
    for mutation in MUTATIONS:
        hit = caught(mutation, range(first, first + SEEDS_OF_A_MUTATION))
        found[mutation.name] = None if hit is None else hit.plan.seed - first + 1
        print(f"planted: {mutation.name}: {'MISSED' if hit is None else f'caught by seed {hit.plan.seed}'}", flush=True)
    report = {
        "federations": federations,
        "federations_signed": signing,
        "rounds": rounds,
        "faults": dict(sorted(faults.items())),
        "lost": lost,
        "doubled": doubled,
        "mutations_caught": sum(seeds is not None for seeds in found.values()),
        "seconds": seconds,
        "federations_per_hour": federations / seconds * 3600,
        "rounds_per_hour": rounds / seconds * 3600,
        "virtual_seconds": virtual,
        "first_seed": first,
        "size": arguments.size,
        "mutations": found,
        "failures": failures,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: value for key, value in report.items() if not isinstance(value, dict | list)}, indent=2))
    print(f"all of it in {RESULT}")
    return int(bool(failures) or report["mutations_caught"] < len(MUTATIONS))


def lies(signed: bool) -> dict[str, Any]:
    """How a federation that signs is run: its broker lies."""
    return {"signed": True, "tampering": 0.15} if signed else {}


def explain(plan: Plan, signed: bool) -> None:
    """Print the smallest plan found that fails, and the end of its trace."""
    small = shrink(plan, lambda plan: run(plan, **lies(signed)).violation is not None)
    again = run(small, **lies(signed), trace=True)
    print("\n".join(again.trace[-200:]))
    print(f"{len(small.faults)} of {len(plan.faults)} faults are needed:")
    for fault in small.faults:
        print(f"  {fault}")
    print(f"{again.violation!r}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
