"""What federations learn on uneven, unreliable, hostile data: ``make bench-learning``.

Each finished trial stays in ``build/bench/learning``, and a benchmark that was broken off goes on from there. What
came of it is ``build/bench/learning.json``, with plots beside it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bench.federations import BUILD, BenchError, machine, write_json
from tests.bench.learning import algorithms, buffered, hostile, mcmahan, personal
from tests.bench.learning.trials import Bench

Measure = Callable[[Bench, bool], dict[str, Any]]
Plot = Callable[[dict[str, Any], Path], None]
PARTS: Mapping[str, tuple[Measure, Plot]] = {
    "mcmahan": (mcmahan.measure, mcmahan.plot),
    "algorithms": (algorithms.measure, algorithms.plot),
    "personal": (personal.measure, personal.plot),
    "hostile": (hostile.measure, hostile.plot),
    "buffered": (buffered.measure, buffered.plot),
}


def main() -> int:
    """Measure the parts and write the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learning", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    full = os.environ.get("FULL", "0") != "0"
    parser.add_argument("--full", action="store_true", default=full, help="the long rows too")
    parser.add_argument("--jobs", type=int, default=0, help="federations at once; one for each core by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"{min(unknown)!r} is no part; there are {', '.join(PARTS)}")
    path = BUILD / "bench" / "learning.json"
    try:
        for name in arguments.parts or PARTS:
            measure, plot = PARTS[name]
            found = measure(Bench(name, arguments.jobs), arguments.full)
            # Read anew, as another part may have been measured meanwhile.
            before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, before | found | {"machine": machine()})
            plot(found, BUILD / "bench" / "learning" / f"{name}.svg")
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
