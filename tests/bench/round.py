"""Seconds per round of the Fashion-MNIST federation over real MQTT, beside a plain PyTorch loop: ``make bench-round``.

Each pair runs fedge (broker, server and phones on all cores) and both forms of the loop in separate processes, in
alternating order; the loop counts with the faster of its two. Nothing is evaluated in either. Results go to
``build/bench/round.json``. What is finished is kept in ``round.parts.json``, from where an interrupted run resumes.

With ``--tls``, instead, the same federation over plain TCP, over TLS with a certificate for everybody, and with signed
messages besides, on mosquitto with the same limits, in alternating order; results go to ``build/bench/round-tls.json``.
"""

import argparse
import json
import os
import resource
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from encrypted import Way, mosquitto
from federations import (
    BUILD,
    ROUNDS,
    RUNS,
    BenchError,
    Sections,
    command,
    data,
    export,
    machine,
    simulate,
    write_json,
)
from parts import Parts

FOLDER = BUILD / "bench" / "round"
PARTS = BUILD / "bench" / "round.parts.json"
RESULT = BUILD / "bench" / "round.json"
TLS_PARTS, TLS_RESULT = PARTS.with_name("round-tls.parts.json"), RESULT.with_name("round-tls.json")

WARMUP = 2
SMALL_ROUNDS = ROUNDS or 30
LOOP_FORMS = {"one process, two threads": (1, 2), "two processes, one thread": (2, 1)}


def fedge(name: str, rounds: int, more: Sections | None = None) -> dict[str, Any]:
    """Measure a federation, with ``more`` settings: median seconds of its rounds after the warm-up."""
    folder = FOLDER / name
    out = simulate(
        RUNS[name],
        folder,
        bundle=FOLDER / f"{name}.model" / "model.fedge",
        settings={"stop": {"rounds": WARMUP + rounds}, "evaluation": {"every": 0}, **(more or {})},
        timeout=60 + 30 * (WARMUP + rounds),
    )
    seconds = [row["seconds"] for row in out["rounds"]]
    if len(seconds) != WARMUP + rounds:
        raise BenchError(f"{folder} ran {len(seconds)} rounds; expected {WARMUP + rounds}")
    return {
        "seconds_per_round": statistics.median(seconds[WARMUP:]),
        "seconds": seconds,
        "peak_rss_mib": out["peak_rss_mib"],
        # Counted at the transport over the whole run: a round's own bytes are what clients had told by its end.
        "bytes_up": out["bytes_up"],
        "bytes_down": out["bytes_down"],
    }


def encrypted(name: str, rounds: int, way: Way) -> dict[str, Any]:
    """Measure a federation on a broker of its own, reached in one way; processor time is that of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with mosquitto(FOLDER / "broker", "bench", RUNS[name].clients, way) as sections:
        found = fedge(name, rounds, sections)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found | {"processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def compare(pairs: int, rounds: int, names: list[str], *, fresh: bool) -> dict[str, Any]:
    """Plain TCP, TLS and signatures in alternating order, and what follows from them."""
    here = machine()
    parts = Parts(TLS_PARTS, {"machine": here, "pairs": pairs, "rounds": rounds}, fresh=fresh)
    found: dict[str, Any] = {"machine": here}
    for name in names:
        count = SMALL_ROUNDS if name == "logistic" else rounds
        export(RUNS[name], FOLDER / f"{name}.model")
        measured: list[dict[str, dict[str, Any]]] = []
        ways: list[Way] = ["tcp", "tls", "signed"]
        for pair in range(1, pairs + 1):
            one = {
                way: parts.get(f"{name} {pair}: {way}", partial(encrypted, name, count, way), say=_seconds)
                for way in (ways if pair % 2 else ways[::-1])
            }
            measured.append(one)
        found[name] = {key: _beside(measured, key) for key in ("seconds_per_round", "processor")}
    parts.end()
    return found


def _beside(pairs: list[dict[str, dict[str, Any]]], key: str) -> dict[str, Any]:
    """Medians of each way, and TLS beside TCP, and what is signed beside TLS alone."""
    tcp, tls, signed = (statistics.median(pair[way][key] for pair in pairs) for way in ("tcp", "tls", "signed"))
    return {
        "tcp": tcp,
        "tls": tls,
        "signed": signed,
        "ratio": tls / tcp,
        "signed_ratio": signed / tls,
        "pair_ratios": [pair["tls"][key] / pair["tcp"][key] for pair in pairs],
        "signed_pair_ratios": [pair["signed"][key] / pair["tls"][key] for pair in pairs],
    }


def loop(name: str, model: str, processes: int, threads: int, rounds: int) -> dict[str, Any]:
    """Measure the plain PyTorch loop on the same federation."""
    run = RUNS[name]
    train, _ = data(run)
    settings = {
        "data": train,
        "model": model,
        "processes": processes,
        "threads": threads,
        "clients": run.clients,
        "cohort": run.sections["round"]["cohort"],
        "alpha": run.sections["simulation"]["alpha"],
        "batch": run.sections["train"]["batch_size"],
        "lr": run.sections["train.hypers"]["lr"],
        "rounds": rounds,
        "warmup": WARMUP,
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    script = str(Path(__file__).with_name("fedavg_torch.py"))
    said = command(
        [sys.executable, script, *arguments], FOLDER / f"{name}.loop.txt", timeout=60 + 30 * (WARMUP + rounds)
    )
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    return result


def measure(pairs: int, rounds: int, *, fresh: bool) -> dict[str, Any]:
    """All measurements, and what follows from them."""
    here = machine()
    parts = Parts(PARTS, {"machine": here, "pairs": pairs, "rounds": rounds}, fresh=fresh)
    timed = partial(parts.get, say=_seconds)
    for name in ("fashion-mnist", "logistic"):
        export(RUNS[name], FOLDER / f"{name}.model")
    contenders: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("fedge", partial(fedge, "fashion-mnist", rounds)),
        *((form, partial(loop, "fashion-mnist", "cnn", *by, rounds)) for form, by in LOOP_FORMS.items()),
    ]
    measured: list[dict[str, dict[str, Any]]] = []
    small: list[dict[str, Any]] = []
    for pair in range(1, pairs + 1):
        order = contenders if pair % 2 else contenders[::-1]
        measured.append({name: timed(f"pair {pair}: {name}", how) for name, how in order})
        small.append(timed(f"pair {pair}: fedge, logistic", partial(fedge, "logistic", SMALL_ROUNDS)))
    small_loop = timed("loop, logistic", partial(loop, "logistic", "logistic", 1, 1, SMALL_ROUNDS))
    ours = [pair["fedge"]["seconds_per_round"] for pair in measured]
    theirs = [min(pair[form]["seconds_per_round"] for form in LOOP_FORMS) for pair in measured]
    seconds, baseline = statistics.median(ours), statistics.median(theirs)
    parts.end()
    return {
        "seconds_per_round": seconds,
        "baseline_seconds_per_round": baseline,
        "ratio": seconds / baseline,
        "peak_rss_mib": max(pair["fedge"]["peak_rss_mib"] for pair in measured),
        "small_seconds_per_round": statistics.median(run["seconds_per_round"] for run in small),
        "small_baseline_seconds_per_round": small_loop["seconds_per_round"],
        "pair_ratios": [mine / yours for mine, yours in zip(ours, theirs, strict=True)],
        "pairs": measured,
        "small": {"fedge": small, "loop": small_loop},
        "machine": here,
    }


def _seconds(measured: dict[str, Any]) -> str:
    return f"{measured['seconds_per_round']:.3f} s a round"


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=int(os.environ.get("FEDGE_PAIRS", "3")))
    parser.add_argument("--rounds", type=int, default=ROUNDS or 8, help="timed rounds in each run")
    parser.add_argument("--tls", action="store_true", help="plain TCP, TLS and signatures beside each other, instead")
    parser.add_argument("--runs", nargs="+", default=["fashion-mnist", "logistic"], help="which, with --tls")
    parser.add_argument("--fresh", action="store_true", help="do not resume an interrupted run")
    arguments = parser.parse_args()
    try:
        if arguments.tls:
            result = compare(arguments.pairs, arguments.rounds, arguments.runs, fresh=arguments.fresh)
            write_json(TLS_RESULT, result)
            print(json.dumps({name: result[name] for name in result if name != "machine"}, indent=2))
            return 0
        result = measure(arguments.pairs, arguments.rounds, fresh=arguments.fresh)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(RESULT, result)
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict | list)}, indent=2))
    print(f"ratio of each pair: {', '.join(f'{ratio:.3f}' for ratio in result['pair_ratios'])}; all of it in {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
