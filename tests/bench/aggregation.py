"""Speed and memory of aggregation: python tests/bench/aggregation.py [--params N] [--clients M].

- ``bandwidth``: bytes a second that the machine's memory gives to one thread, as numpy adds one float64 vector to
  another (``add``: two are read and one of them is written) and as it copies one to another (``copy``).
- ``streaming``: each rule's ``add`` of one update and its ``finish``, in milliseconds, beside the bytes that must be
  moved: an add reads the update (4 bytes a parameter) and reads and writes the sum (16), a finish reads the sum
  (8) and writes the aggregate elsewhere (4). ``factor`` is how many times as long it takes as these bytes do in an
  addition, or in a copy. All times are the processor's, and contenders take turns: others may use the machine.
- ``optimizers``: one step of each server optimizer, in milliseconds.
- ``robust``: each rule over all updates of a task, in a process of its own, from a ledger on the disk with quantized
  updates: seconds of processor and wall, bytes of an update, and the memory that it took beside what the process had.
  The updates are noise around a direction that all of them share; few are encoded, and used by several clients each.

Rules that judge each element get updates as fine as the configuration asks of them (``nmse`` 0.01), others those of
the default (0.1). Results go to build/bench/aggregation.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from federations import BUILD, ROOT, machine, write_json

from broker_server.aggregation import registry
from broker_server.aggregation.blocks import LedgerBlocks
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.weighting import Report, bounded
from broker_server.ledger import Ledger
from broker_server.records import Task
from edge_client.codec.layout import Layout, TensorSpec, Vector
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.emulator.fleet import peak_rss_mib
from edge_client.wire.messages import RECEIVED_LOSS

TURNS, REPEATS = 5, 5
DIFFERENT = 5
"""Updates that are encoded."""
NOISE = {True: 0.01, False: 0.1}
"""What codes lose of an update, by whether a rule judges each element."""
REPORT = Report("a", 32, {"steps": 10.0, RECEIVED_LOSS: 1.0}, weight=32.0)


def layout(params: int) -> Layout:
    """Square matrices, and what is left over."""
    side = 1000
    whole, rest = divmod(params, side * side)
    tensors = [TensorSpec(f"weight{number}", (side, side)) for number in range(whole)]
    return Layout((*tensors, *([TensorSpec("rest", (rest,))] if rest else [])))


def milliseconds(work: Callable[[], object]) -> list[float]:
    """Each of several runs, after one that is not counted."""
    taken = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - start))
    return taken[1:]


def measured(taken: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"ms": statistics.median(taken), "least_ms": min(taken), "most_ms": max(taken)}


def streaming(params: int) -> dict[str, Any]:
    """Bandwidth, rules and optimizers; what is compared is measured in turn."""
    rng = np.random.default_rng(0)
    update: Vector = rng.standard_normal(params, dtype=np.float32)
    one, other = np.ones(params), np.ones(params)
    local = LocalTraining("sgd", 0.1)
    rows: dict[str, dict[str, list[float]]] = {}
    rates: dict[str, list[float]] = {"add": [], "copy": []}
    rules = {
        name: rule
        for name, chosen in registry.ALGORITHMS.items()
        if isinstance(rule := chosen.make(chosen.options(), local), Aggregator)
    }
    for _ in range(TURNS):
        rates["add"] += [24e3 * params / taken for taken in milliseconds(lambda: np.add(one, other, out=one))]
        rates["copy"] += [16e3 * params / taken for taken in milliseconds(lambda: np.copyto(one, other))]
        for name, rule in rules.items():
            state = rule.init(params)
            row = rows.setdefault(name, {"add": [], "finish": []})
            row["add"] += milliseconds(lambda rule=rule, state=state: rule.add(state, update, REPORT))
            full = rule.add(state, update, REPORT)
            row["finish"] += milliseconds(lambda rule=rule, full=full: rule.finish(full))
    bandwidth = {kind: statistics.median(found) for kind, found in rates.items()}
    found: dict[str, Any] = {"bandwidth": bandwidth, "streaming": {}, "optimizers": {}}
    for name, row in rows.items():
        found["streaming"][name] = {
            part: measured(row[part])
            | {"factor": statistics.median(row[part]) * bandwidth[kind] / (size * params) / 1e3}
            for part, kind, size in (("add", "add", 20), ("finish", "copy", 12))
        }
    found["bounded_ms"] = statistics.median(milliseconds(lambda: bounded(1.0)(REPORT, update)))
    for name, chosen in registry.OPTIMIZERS.items():
        optimizer = chosen.make(chosen.options())
        state = optimizer.init(params)
        found["optimizers"][name] = measured(milliseconds(lambda o=optimizer, s=state: o.step(s, update, 0)))
    return found


def prepare(folder: Path, params: int) -> None:
    """Encode the updates, at both rates."""
    rng = np.random.default_rng(1)
    direction = rng.laplace(0, 0.005, params).astype(np.float32)
    for number in range(DIFFERENT):
        update = direction + rng.laplace(0, 0.01, params).astype(np.float32)
        for noise in NOISE.values():
            encoded = encode_update(
                {"delta": update}, {"delta": layout(params)}, {"samples": 1}, CodecSettings(value=noise)
            )
            (folder / f"{noise}-{number}").write_bytes(encoded.data)


def robust(name: str, params: int, clients: int, prepared: Path, scratch: Path) -> dict[str, float]:
    """One rule over a ledger; run in a process of its own."""
    chosen = registry.ALGORITHMS[name]
    rule = chosen.make(chosen.options(), LocalTraining())
    assert isinstance(rule, CohortAggregator)
    data = [(prepared / f"{NOISE[chosen.every_element]}-{number}").read_bytes() for number in range(DIFFERENT)]
    names = [f"c{number}" for number in range(clients)]
    with Ledger.open(scratch / "ledger.db", federation="bench", bundle="b") as ledger:
        ledger.open_task(
            Task(epoch=1, task=1, round=1, kind="train", version=0, cohort=tuple(names), plan=b"", opened=0.0)
        )
        with ledger.group():
            for number, client in enumerate(names):
                ledger.record(1, 1, client, data[number % DIFFERENT], 1)
        size = sum(map(len, data)) / DIFFERENT
        del data
        # No two clients' updates are the same.
        reports = [Report(client, scale=1.0 - 1e-3 * number) for number, client in enumerate(names)]
        blocks = LedgerBlocks(
            reports, lambda member: ledger.update(1, 1, names[member]), {"delta": layout(params)}, "delta", scratch
        )
        before, wall, processor = peak_rss_mib(), time.perf_counter(), time.process_time()
        rule.finish(blocks)
        return {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": time.process_time() - processor,
            "update_bytes": size,
            "memory_mib": peak_rss_mib() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=10_000_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--robust", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.robust:
        print(json.dumps(robust(given.robust, given.params, given.clients, given.prepared, given.scratch)))
        return
    found: dict[str, Any] = {"machine": machine(), "params": given.params, "clients": given.clients}
    found |= streaming(given.params)
    rates = ", ".join(f"{kind} {rate / 1e9:.1f} GB/s" for kind, rate in found["bandwidth"].items())
    print(f"memory, one thread: {rates}")
    for name, row in found["streaming"].items():
        parts = ", ".join(f"{part} {row[part]['ms']:.1f} ms ({row[part]['factor']:.2f})" for part in row)
        print(f"{name}: {parts}")
    for name, row in found["optimizers"].items():
        print(f"server's {name}: {row['ms']:.1f} ms")
    found["robust"] = {}
    BUILD.mkdir(parents=True, exist_ok=True)
    # Not where temporary files are: that may be memory.
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="aggregation-") as folder:
        prepared = Path(folder)
        prepare(prepared, given.params)
        for name, chosen in registry.ALGORITHMS.items():
            if isinstance(chosen.make(chosen.options(), LocalTraining()), Aggregator):
                continue
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                options = ["--params", str(given.params), "--clients", str(given.clients)]
                options += ["--robust", name, "--prepared", folder, "--scratch", scratch]
                done = subprocess.run(
                    [sys.executable, __file__, *options], cwd=ROOT, capture_output=True, text=True, check=True
                )
            row = found["robust"][name] = json.loads(done.stdout)
            print(
                f"{name}: {row['seconds']:.1f} s ({row['processor_seconds']:.1f} s of a processor), "
                f"{row['memory_mib']:.0f} MiB, updates of {row['update_bytes'] / 1e6:.2f} MB",
                flush=True,
            )
            # After each: the next ones take minutes.
            write_json(BUILD / "bench" / "aggregation.json", found)


if __name__ == "__main__":
    main()
