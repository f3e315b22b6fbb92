"""One training step, and what it takes to get there, beside PyTorch: ``make bench-training``.

Per case and number of threads, pairs of processes alternate: fedge as ``fedge join`` trains, and PyTorch eager by the
usual loop; at two threads also as ``fedge join --spin`` trains. Once beside them, where they run: `torch.compile`,
channels-last memory, the peers (``PEERS=1``). Then peak memory, cold start and installed size (footprint.py).

Results go to ``build/bench/training.json`` and, as a table for the README, ``training.md``. What is finished is kept
in ``training.parts.json``, from where an interrupted run resumes.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import footprint
import psutil
from cases import CASES, Case, export_case, write_gemm, write_samples
from federations import BUILD, ROOT, BenchError, command, machine, write_json
from parts import Parts
from peers import PEERS, Environment
from table import table

FOLDER = BUILD / "bench" / "training"
PARTS = BUILD / "bench" / "training.parts.json"
RESULT = BUILD / "bench" / "training.json"
TABLE = BUILD / "bench" / "training.md"
HERE = Path(__file__).parent

CHAPTERS = ("steps", "memory", "start", "install")
BESIDE = ("compile", "channels_last", *PEERS)
THREADS = (1, 2)
BUSY = 0.05
"""Share of the machine that others may take before a pair is measured again, and a result called into doubt."""
Timed = dict[str, float]


def environment(threads: int = 1) -> dict[str, str]:
    """What all contenders find in their environment: this checkout, as many threads, no say in the allocator's."""
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "ORT_DISABLE_TELEMETRY": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
    }


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    threads: tuple[int, ...]
    pairs: int
    seconds: float
    """Timed seconds of each process."""
    attempts: int
    """At a pair, until others leave the machine alone."""


@dataclass(frozen=True)
class Run:
    """How to measure one case at one number of threads; each method starts a process."""

    name: str
    case: Case
    threads: int
    plan: Plan

    @property
    def bundle(self) -> Path:
        return FOLDER / f"{self.name}.fedge"

    @property
    def samples(self) -> Path:
        return FOLDER / f"{self.name}.npz"

    def fedge(self, *options: str) -> Timed:
        """fedge's step, as ``fedge join`` trains."""
        label = "".join(["fedge", *options])
        return self._timed(label, "step_fedge.py", str(self.bundle), str(self.samples), *options)

    def torch(self, *options: str, timeout: float = 120.0) -> Timed:
        """PyTorch's step, by the usual loop."""
        label = "".join(["torch", *options])
        return self._timed(label, "step_torch.py", self.case.factory, str(self.samples), *options, timeout=timeout)

    def peer(self, environment: Environment) -> Timed:
        """Another kit's step; the first time it is exported for that kit."""
        place, python = FOLDER / f"{self.name}.{environment.name}", str(environment.python())
        given = [self.case.factory, str(self.samples), "--program", str(place)]
        return self._timed(environment.name, environment.script, *given, python=python, timeout=600.0)

    def _timed(
        self, label: str, script: str, *arguments: str, python: str = sys.executable, timeout: float = 120.0
    ) -> Timed:
        program = [python, str(HERE / script), *arguments, *_settings(self.threads, self.plan.seconds)]
        log = FOLDER / "log" / f"{self.name}.{self.threads}.{label}.txt"
        others = Others()
        found = answer(command(program, log, timeout=timeout, variables=environment(self.threads)))
        found["others"] = others.share()
        if not math.isfinite(found["loss"]):
            raise BenchError(f"{self.name}: the loss of {label} is {found['loss']}: it does not train")
        return found


class Others:
    """How much of the machine's processor time goes to processes that are not ours, from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Their share of all cores' time, 0 to 1: above a few hundredths, times of two threads mean little."""
        busy, ours, total = (after - before for after, before in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - ours) / total

    @staticmethod
    def _now() -> tuple[float, float, float]:
        spent = psutil.cpu_times()
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        total = sum(spent) - getattr(spent, "guest", 0.0) - getattr(spent, "guest_nice", 0.0)
        ours = sum(one.ru_utime + one.ru_stime for one in usage)
        return total - spent.idle - getattr(spent, "iowait", 0.0), ours, total


def answer(said: str) -> dict[str, Any]:
    """The JSON on the last line of what a program says."""
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def flop(name: str, case: Case) -> dict[str, Any]:
    """GFLOP of the case's step, counted on PyTorch's."""
    program = [sys.executable, str(HERE / "step_torch.py"), case.factory, str(FOLDER / f"{name}.npz"), "--flop"]
    return answer(command(program, FOLDER / "log" / f"{name}.flop.txt", variables=environment()))


def gemm_rate(threads: int, seconds: float) -> dict[str, Any]:
    """The runtime's GFLOP/s."""
    model = FOLDER / "gemm.onnx"
    write_gemm(model)
    program = [sys.executable, str(HERE / "step_fedge.py"), "--gemm", str(model), *_settings(threads, seconds)]
    return answer(command(program, FOLDER / "log" / f"gemm.{threads}.txt", variables=environment(threads)))


def exported(name: str, case: Case) -> dict[str, Any]:
    """Export a case and write its samples; ``seconds`` are those of the whole command, imports included."""
    bundle = FOLDER / f"{name}.fedge"
    for stale in FOLDER.glob(f"{name}.*"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    write_samples(case, FOLDER / f"{name}.npz")
    start = time.monotonic()
    export_case(case, bundle, environment())
    return {"bytes": bundle.stat().st_size, "seconds": time.monotonic() - start}


def pair(run: Run, number: int) -> dict[str, Timed]:
    """One pair; who begins alternates. Where others took part of the machine, the least disturbed of some attempts."""
    order: list[tuple[str, Callable[[], Timed]]] = [("fedge", run.fedge), ("torch", run.torch)]
    if run.threads > 1:
        order.append(("spin", lambda: run.fedge("--spin")))
    attempts = []
    for _ in range(run.plan.attempts):
        attempts.append({name: measure() for name, measure in (order if number % 2 else order[::-1])})
        if _disturbed(attempts[-1]) <= BUSY:
            break
    return min(attempts, key=_disturbed)


def _disturbed(pair: dict[str, Timed]) -> float:
    return max(one["others"] for one in pair.values())


def tried(measure: Callable[[], Timed]) -> dict[str, Any]:
    """A contender that may not run here: its time, or why there is none."""
    try:
        return {"step_ms": measure()["step_ms"]}
    except BenchError as error:
        return {"error": str(error)}


def measure_case(parts: Parts, run: Run, extra: dict[str, Callable[[Run], Timed]]) -> dict[str, Any]:
    """All that is measured on one case at one number of threads.

    Raises:
        BenchError: fedge or PyTorch failed.
    """
    where = f"{run.case.title}, {run.threads} threads"
    work = parts.get(
        f"{run.case.title}, work", partial(flop, run.name, run.case), say=lambda w: f"{w['gflop']:.3f} GFLOP"
    )
    measured = [
        parts.get(f"{where}, pair {number}", partial(pair, run, number), say=_pair)
        for number in range(1, run.plan.pairs + 1)
    ]
    others = {
        name: parts.get(f"{where}, {name}", partial(tried, partial(how, run)), say=str) for name, how in extra.items()
    }
    ours, theirs = ([one[side]["step_ms"] for one in measured] for side in ("fedge", "torch"))
    ratios = [mine / yours for mine, yours in zip(ours, theirs, strict=True)]
    rate = parts.get(f"{where}, Gemm", partial(gemm_rate, run.threads, run.plan.seconds), say=_rate)
    found: dict[str, Any] = {
        "model": run.name,
        "title": run.case.title,
        "threads": run.threads,
        "step_ms": statistics.median(ours),
        "torch_step_ms": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "ratios": ratios,
        **_spinning(measured),
        # Of the fastest processes: rough, but little moved by what others do on the machine.
        "best_ratio": min(ours) / min(theirs),
        "gflop": work["gflop"],
        "gemm_gflops": rate["gflops"],
        "others": max(map(_disturbed, measured)),
    }
    for name, one in others.items():
        found |= {f"{name}_step_ms": one.get("step_ms")} | ({f"{name}_error": one["error"]} if "error" in one else {})
    return found


def _spinning(measured: list[dict[str, Timed]]) -> dict[str, float]:
    """The same with threads that stay awake within a step, as ``fedge join --spin`` trains."""
    if "spin" not in measured[0]:
        return {}
    ratios = [one["spin"]["step_ms"] / one["torch"]["step_ms"] for one in measured]
    times = [one["spin"]["step_ms"] for one in measured]
    return {"spin_step_ms": statistics.median(times), "spin_ratio": statistics.median(ratios)}


def _peer(environment: Environment, run: Run) -> Timed:
    return run.peer(environment)


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile; of one value, that value."""
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def beside(wanted: list[str]) -> dict[str, Callable[[Run], Timed]]:
    """How to measure each of the contenders that are not in the pairs."""
    known: dict[str, Callable[[Run], Timed]] = {
        "compile": lambda run: run.torch("--compile", timeout=300.0),
        "channels_last": lambda run: run.torch("--channels-last"),
    }
    known |= {name: partial(_peer, Environment(name, peer, BUILD / "bench" / "peers")) for name, peer in PEERS.items()}
    return {name: known[name] for name in wanted}


def measure_steps(
    parts: Parts, names: list[str], plan: Plan, extra: dict[str, Callable[[Run], Timed]]
) -> dict[str, Any]:
    """Every case; what fails is reported beside the others."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    bundles: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        try:
            if not (FOLDER / f"{name}.fedge").exists():
                parts.forget(f"{case.title}, export")
            bundles[name] = parts.get(f"{case.title}, export", partial(exported, name, case), say=_bytes)
            for threads in plan.threads:
                more = {n: how for n, how in extra.items() if n != "channels_last" or case.convolution}
                run = Run(name, case, threads, plan)
                cases.append(measure_case(parts, run, more))
        except BenchError as error:
            failed[name] = str(error)
            print(f"{case.title}: {error}", file=sys.stderr, flush=True)
    # One rate for all, the best of those measured between the cases: it is a limit.
    rates = {n: max((c["gemm_gflops"] for c in cases if c["threads"] == n), default=0.0) for n in plan.threads}
    for found in cases:
        found["limit_ms"] = found["gflop"] / rates[found["threads"]] * 1e3
        found["of_limit"] = found["limit_ms"] / found["step_ms"]
    return {"cases": cases, "failed": failed, "bundles": bundles, "gemm_gflops": rates} | summary(cases)


def measure_footprint(parts: Parts, chapters: list[str], pairs: int, failed: dict[str, str]) -> dict[str, Any]:
    """The chapters beside steps; what fails goes into ``failed``."""
    place = footprint.Place(FOLDER, environment())
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": partial(footprint.memory, place),
        "start": partial(footprint.cold_start, place, pairs),
        "install": partial(footprint.install, place),
    }
    found: dict[str, Any] = {}
    for chapter in [name for name in measures if name in chapters]:
        try:
            if chapter != "install":
                if not place.bundle.exists():
                    parts.forget("images, export")
                parts.get("images, export", partial(footprint.prepare, place), say=_bytes)
            found |= parts.get(chapter, measures[chapter], say=json.dumps)
        except BenchError as error:
            failed[chapter] = str(error)
            print(f"{chapter}: {error}", file=sys.stderr, flush=True)
    return found


def summary(cases: list[dict[str, Any]]) -> dict[str, float | None]:
    """Geometric means of the ratios at one and two threads, awake ones too, and the worst ratio but for those."""
    found: dict[str, float | None] = {}
    for threads in THREADS:
        ratios = [case["ratio"] for case in cases if case["threads"] == threads]
        found[f"geomean_ratio_{threads}"] = statistics.geometric_mean(ratios) if ratios else None
    spinning = [case["spin_ratio"] for case in cases if "spin_ratio" in case]
    found["geomean_ratio_2_spin"] = statistics.geometric_mean(spinning) if spinning else None
    found["max_ratio"] = max((case["ratio"] for case in cases), default=None)
    return found


def sources() -> str:
    """A hash of what is measured, so that a run never resumes from measurements of other code."""
    state = hashlib.sha256()
    for package in ("edge_client", "broker_server", "export", "tests/bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()


def _settings(threads: int, seconds: float) -> list[str]:
    return ["--threads", str(threads), "--seconds", str(seconds)]


def _rate(found: dict[str, float]) -> str:
    return f"{found['gflops']:.0f} GFLOP/s"


def _bytes(found: dict[str, int]) -> str:
    return f"{found['bytes']:,} bytes"


def _pair(found: dict[str, Timed]) -> str:
    ours, theirs = found["fedge"]["step_ms"], found["torch"]["step_ms"]
    return f"{ours:.3f} ms beside {theirs:.3f}: {ours / theirs:.3f}"


def main() -> int:
    """Measure and report."""
    default = BESIDE if os.environ.get("PEERS") == "1" else BESIDE[:2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=int(os.environ.get("FEDGE_PAIRS", "7")))
    parser.add_argument("--seconds", type=float, default=1.5, help="timed seconds of each process")
    parser.add_argument("--attempts", type=int, default=3, help="at a pair, until others leave the machine alone")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="numbers of threads")
    parser.add_argument("--chapters", default=",".join(CHAPTERS), help="what to measure, separated by commas")
    parser.add_argument("--beside", default=",".join(default), help=f"other contenders, of {', '.join(BESIDE)}")
    parser.add_argument("--fresh", action="store_true", help="do not resume an interrupted run")
    given = parser.parse_args()
    names, chapters = given.cases or list(CASES), given.chapters.split(",")
    plan = Plan(tuple(map(int, given.threads.split(","))), given.pairs, given.seconds, given.attempts)
    others = [name for name in given.beside.split(",") if name]
    for what, wanted, known in (("case", names, CASES), ("chapter", chapters, CHAPTERS), ("contender", others, BESIDE)):
        if unknown := set(wanted) - set(known):
            parser.error(f"{unknown.pop()!r} is no {what}; there are {', '.join(known)}")
    here = machine()
    key = {"machine": here, "seconds": given.seconds, "sources": sources()}
    parts = Parts(PARTS, key, fresh=given.fresh)
    result: dict[str, Any] = {"machine": here, "pairs": given.pairs, "seconds": given.seconds}
    if "steps" in chapters:
        result |= measure_steps(parts, names, plan, beside(others))
    result |= measure_footprint(parts, chapters, given.pairs, result.setdefault("failed", {}))
    write_json(RESULT, result)
    TABLE.write_text(table(result))
    if not result["failed"]:
        parts.end()
    print(table(result))
    if (others := max((case["others"] for case in result.get("cases", [])), default=0.0)) > BUSY:
        print(f"other processes took up to {others:.0%} of this machine: the times will not hold", file=sys.stderr)
    print(f"all of it in {RESULT}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
