"""Bytes up and down until a federation is as accurate as fp32 FedAvg: fedge, and STC, beside it.

python tests/bench/bytes.py [CASE ...] [--seeds N] [--fresh]

Each finished run stays in ``build/bench/bytes``, and a benchmark that was broken off goes on from there. The result is
``build/bench/bytes.json``.

- fedge runs as ``fedge simulate`` on mosquitto, with the settings that are best for the case (`SETTINGS`): all bytes
  that the phones' transports counted, MQTT framing and control messages included, but for those of getting the bundle.
  With its defaults it runs beside, by the first seed (``plain``).
- fp32 FedAvg is the same program with codec ``none``; beside it stands fp32 FedAvg with the server momentum that fedge
  has (``momentum``). Its accuracy is computed in one process, where the same phones
  train on the same shuffles; its bytes are those of a round on the wire in a short run, whose accuracy must agree.
- STC is computed in one process: its own bytes as of its paper, and fedge's control messages. Its sparsity is the best
  of a few, by the first seed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ternary_federation
from curves import Curve, compare
from federations import BUILD, ROUNDS, RUNS, BenchError, Run, Sections, data, export, machine, simulate, write_json
from loopback import Loopback, loopback

from broker_server.aggregation.optimizer import trace
from edge_client.codec.layout import Vector
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics

CLIENTS = int(os.environ.get("FEDGE_CLIENTS", "0"))
"""Phones of each run, half of them in each round, where a test wants few; 0 leaves them as they are."""
CASES = ("fashion-mnist", "mnist-writers", "shakespeare")
SEEDS = 3
SHARES = (1 / 25, 1 / 100, 1 / 400)
"""Sparsities that the paper of STC uses."""
MOMENTUM: Sections = {"server": {"options": {"momentum": 0.5}}}
SETTINGS: dict[str, Sections] = {
    "fashion-mnist": MOMENTUM,
    "mnist-writers": MOMENTUM,
    "shakespeare": {**MOMENTUM, "codec": {"model_step": 15.0, "model_noise": 0.05}},
}
"""What fedge is told beyond its defaults: quantization delays what clients learn, and momentum makes up for that."""
LONGER = 1.2
"""Contenders may take so many times the rounds of fp32 FedAvg."""
SHORT = 3
"""Rounds of a run that shows what a round takes on the wire."""
NOTHING = transfer.refer(b"", chunk=65536, inline=m.INLINE_LIMIT)
EPOCH = 1_700_000_000
"""About what a server's first is: seconds since 1970."""
AGREES = 0.01
"""How far accuracies in one process and on the wire may be apart: sums are added in another order."""


class Case:
    """One federation, and its runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.run = fewer(RUNS[name], CLIENTS) if CLIENTS else RUNS[name]
        self.folder = BUILD / "bench" / "bytes"
        self.budget = ROUNDS or self.run.rounds
        self.longer = math.ceil(LONGER * self.budget)

    @cached_property
    def bundle(self) -> Path:
        """Exported once, so that runs of before keep their meaning."""
        path = self.folder / f"{self.name}.model" / "model.fedge"
        return path if path.exists() else export(self.run, path.parent)

    def loopback(self, seed: int) -> Loopback:
        """The federation in this process."""
        return loopback(self.run, self.bundle, seed)

    def kept(self, contender: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a run came to, from its file or from now."""
        path = self.folder / f"{self.name}-{contender}.json"
        if not path.exists():
            print(f"{self.name}: {contender}", flush=True)
            write_json(path, make())
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def wire(self, seed: int, rounds: int, sections: Sections, label: str) -> dict[str, Any]:
        """A run of ``fedge simulate``: accuracy and bytes of each round, and those of getting started."""
        _, test = data(self.run)
        out = simulate(
            self.run,
            self.folder / f"{self.name}-{label}.run",
            bundle=self.bundle,
            settings={
                **sections,
                "federation": {"seed": seed},
                "evaluation": {"data": str(test), "every": 1},
                "stop": {"rounds": rounds},
            },
            timeout=600 + 300 * rounds,
        )
        up, down = ([row[key] for row in out["rounds"]] for key in ("bytes_up", "bytes_down"))
        joining = [up[0] + down[0], out["bytes_up"] + out["bytes_down"] - sum(up) - sum(down)]
        up[0], down[0] = first_round(self.folder / f"{self.name}-{label}.run" / "state", up)
        joining[0] -= up[0] + down[0]
        return {
            "accuracy": [row["metrics"]["accuracy"] for row in out["rounds"]],
            "bytes": [sent + received for sent, received in zip(up, down, strict=True)],
            "bytes_up": up,
            "bytes_down": down,
            "joining_bytes": sum(joining),
            "bundle_bytes": self.bundle.stat().st_size,
            "settings": sections,
            "seconds": sum(row["seconds"] for row in out["rounds"]),
        }

    def fedge(self, seed: int, sections: Sections, name: str = "fedge") -> tuple[dict[str, Any], Curve]:
        """fedge with these settings."""
        label = f"{name}-{seed}"
        found = self.kept(label, lambda: self.wire(seed, self.longer, sections, label))
        if found["settings"] != sections:
            raise BenchError(f"{self.name}: {label} ran with {found['settings']}; --fresh forgets that run")
        return found, self._curve(seed, found["accuracy"], found["bytes"])

    def fp32(self, seed: int, momentum: float = 0.0) -> Curve:
        """fp32 FedAvg, with server momentum.

        Raises:
            BenchError: it learns otherwise on the wire than in one process.
        """
        name = f"momentum-{seed}" if momentum else f"fp32-{seed}"
        found = self.kept(name, lambda: {"accuracy": self._accuracies(self._fedavg(seed, momentum), seed)})
        accuracy, short = found["accuracy"], min(SHORT, self.budget)
        wire = self.kept("fp32-wire", lambda: self.wire(0, short, {"codec": {"kind": "none"}}, "fp32-wire"))
        if seed == 0 and not momentum and max(np.abs(np.subtract(accuracy[:short], wire["accuracy"]))) > AGREES:
            raise BenchError(
                f"{self.name}: fp32 FedAvg has accuracies {accuracy[:short]} in one process and {wire['accuracy']} on "
                "the wire; expected the same federation"
            )
        first, *others = wire["bytes"]
        later = round(float(np.mean(others))) if others else first
        return self._curve(seed, accuracy, [first] + [later] * (len(accuracy) - 1))

    def stc(self, seed: int, share: float) -> Curve:
        """STC at one sparsity."""

        def make() -> dict[str, Any]:
            spent: list[int] = []

            def models() -> Iterator[Vector]:
                federation = self.loopback(seed)
                for model, size in ternary_federation.train(federation, self.longer, share):
                    spent.append(size + federation.cohort * control_bytes())
                    yield model

            return {"accuracy": self._accuracies(models(), seed), "bytes": spent}

        found = self.kept(f"stc-{1 / share:.0f}-{seed}", make)
        return Curve(found["accuracy"], np.cumsum(found["bytes"]).tolist())

    def _fedavg(self, seed: int, momentum: float) -> Iterator[Vector]:
        federation, optimizer = self.loopback(seed), trace(momentum)
        model = federation.bundle.initial()
        state = optimizer.init(model.size)
        for number in range(1, self.budget + 1):
            total, weight = np.zeros(model.size), 0
            for _, delta, samples in federation.deltas(model, number):
                total += samples * delta.astype(np.float64)
                weight += samples
            step, state = optimizer.step(state, (total / weight).astype(np.float32), number - 1)
            model = model + step
            yield model

    def _accuracies(self, models: Iterator[Vector], seed: int) -> list[float]:
        federation, found = self.loopback(seed), []
        for number, model in enumerate(models, 1):
            found.append(federation.accuracy(model))
            if number % 10 == 0:
                print(f"  round {number}: accuracy {found[-1]:.4f}", flush=True)
        return found

    def _curve(self, seed: int, accuracy: list[float], told: list[int]) -> Curve:
        """With the receipts that phones had not told of by then: one for each that took part."""
        federation, met, total = self.loopback(seed), set[int](), np.cumsum(told).tolist()
        for number in range(1, len(accuracy) + 1):
            met.update(federation.asked(number))
            total[number - 1] += len(met) * receipt_bytes()
        return Curve(accuracy, total)


def fewer(run: Run, clients: int) -> Run:
    """The same with so many phones, and half of them in a round."""
    sections = {**run.sections, "round": {**run.sections["round"], "cohort": clients // 2}}
    return dataclasses.replace(run, clients=clients, sections=sections)


def first_round(state: Path, up: list[int]) -> tuple[int, int]:
    """Bytes up and down of a run's first round, in which phones also tell what their bundles took.

    The ledger knows its updates; what a round sends beside them is known from the second. Nobody has to fetch the
    untrained model, so that the way down has control messages only.
    """
    with contextlib.closing(sqlite3.connect(state / "ledger.db")) as ledger:
        rows = ledger.execute("SELECT count(*), sum(size) FROM updates GROUP BY epoch, task ORDER BY epoch, task")
        (phones, first), (_, second), *_ = rows.fetchall()
    return first + up[1] - second, phones * invitation_bytes()


def packet_bytes(topic: str, payload: bytes) -> int:
    """A QoS 1 PUBLISH and its PUBACK, MQTT 3.1.1."""
    rest = 2 + len(topic) + 2 + len(payload)
    return 1 + max(1, math.ceil(rest.bit_length() / 7)) + rest + 4


def receipt_bytes() -> int:
    """One receipt."""
    return packet_bytes(Topics("bench").down("phone-0000"), m.encode(m.Receipt(EPOCH, 100, "recorded")))


def invitation_bytes() -> int:
    """One invitation, without the model."""
    plan = m.TrainPlan(batch_size=32, hypers={"lr": 0.05})
    invitation = m.Invitation(EPOCH, 100, 100, "train", plan, m.UpdatePlan(), 1, 300.0, 90, 99, bytes(32), NOTHING)
    return packet_bytes(Topics("bench").down("phone-0000"), m.encode(invitation))


def control_bytes() -> int:
    """What a phone and the server say to each other about one task, without the model and the update."""
    upload = m.Upload(EPOCH, 100, NOTHING, m.Traffic(10**6, 10**6))
    told = packet_bytes(Topics("bench").up("phone-0000"), m.encode(upload))
    return invitation_bytes() + told + receipt_bytes()


def measure(case: Case, seeds: int) -> dict[str, Any]:
    """A case's fields."""
    sections = SETTINGS[case.name]
    runs = [case.fedge(seed, sections) for seed in range(seeds)]
    fp32 = [case.fp32(seed) for seed in range(seeds)]
    curves = {"fp32": fp32, "fedge": [curve for _, curve in runs]}
    momentum = 0.5 if "server" in sections else 0.0
    if momentum:
        curves["momentum"] = [case.fp32(seed, momentum) for seed in range(seeds)]
    tries = {share: compare(curves | {"stc": [case.stc(0, share)] * seeds}, case.budget) for share in SHARES}
    best = min(SHARES, key=lambda share: _cost(tries[share]["seeds"]["stc"][0]))
    found = compare(curves | {"stc": [case.stc(seed, best) for seed in range(seeds)]}, case.budget)
    plain = case.fedge(0, {}, "plain")[1] if sections else curves["fedge"][0]
    found["plain"] = compare({"fp32": fp32[:1], "plain": [plain]}, case.budget)["seeds"]["plain"][0]
    found["stc_tried"] = {f"1/{1 / share:.0f}": tried["seeds"]["stc"][0] for share, tried in tries.items()}
    return {
        "name": case.name,
        "factor": found["fedge_factor"],
        "rounds": found["fedge_rounds"],
        "bundle_bytes": runs[0][0]["bundle_bytes"],
        "joining_bytes": runs[0][0]["joining_bytes"],
        "clients": case.run.clients,
        "settings": sections,
        "stc_share": best,
        **found,
    }


def _cost(found: dict[str, Any]) -> tuple[bool, float, int]:
    """Those that get there first, by their bytes; then by how near they come."""
    return (not found["reached"], 0.0 if found["reached"] else -found["accuracy"], found["bytes"])


def main() -> int:
    """Measure the cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"{min(unknown)!r} is no case; there are {', '.join(CASES)}")
    if arguments.fresh:
        for path in (BUILD / "bench" / "bytes").glob("*.json"):
            path.unlink()
    result: dict[str, Any] = {"cases": [], "machine": machine()}
    try:
        for name in arguments.cases or CASES:
            case = measure(Case(name), arguments.seeds)
            result["cases"].append(case)
            factor = "target missed" if case["factor"] is None else f"{case['factor']:.0f} times fewer bytes"
            print(
                f"{name}: fp32 {case['fp32_bytes']:,.0f} bytes to {case['fp32_accuracy']:.4f}, fedge "
                f"{case['fedge_bytes']:,.0f} to {case['fedge_accuracy']:.4f} in {case['fedge_lag']:.2f} times the "
                f"rounds: {factor}; STC {case['stc_bytes']:,.0f} to {case['stc_accuracy']:.4f}",
                flush=True,
            )
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(BUILD / "bench" / "bytes.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
