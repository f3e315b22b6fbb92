"""The benchmarks' federations without a broker: same phones, same cohorts, same shuffles as ``fedge simulate`` draws.

What an algorithm learns does not depend on how its bytes travel, so that contenders which fedge does not ship, and
fp32 FedAvg, are trained here; a short run on the wire shows that both are the same federation.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from federations import Run, data

from broker_server.metrics import combine
from broker_server.selection import Candidate, select
from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.data import Arrays, ArraySource
from edge_client.emulator.partition import Indices, partition
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan


@dataclass(frozen=True)
class Loopback:
    """One federation in this process."""

    bundle: Bundle
    trainer: Trainer
    train: Arrays
    test: Arrays
    parts: Sequence[Indices]
    """Rows of each phone."""
    cohort: int
    plan: TrainPlan
    seed: int

    def asked(self, number: int) -> list[int]:
        """Phones of a round, counted from 1."""
        everyone = [Candidate(_name(phone)) for phone in range(len(self.parts))]
        rng = random.Random(f"{self.seed}/{number}/{number}")  # a round has one task here
        return [int(name.rpartition("-")[2]) for name in select(everyone, self.cohort, rng)]

    def deltas(self, model: Vector, number: int) -> Iterator[tuple[int, Vector, int]]:
        """Phone, what it learned (``[n] float32``) from ``model``, and its samples, for each phone of a round."""
        for phone in self.asked(number):
            text = f"{self.seed}/{number}/{_name(phone)}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
            local = model.copy()
            result = self.trainer.train(local, ArraySource(self.train, self.parts[phone]), self.plan, seed=seed)
            yield phone, local - model, result.samples

    def accuracy(self, model: Vector) -> float:
        """On the test set."""
        return combine([self.trainer.evaluate(model, ArraySource(self.test), batch_size=256)])["accuracy"]


def loopback(run: Run, bundle_path: Path, seed: int) -> Loopback:
    """The federation of a run that ``federations.simulate`` would start with this bundle and seed."""
    arrays = []
    for path in data(run):
        with np.load(path) as file:
            arrays.append(dict(file))
    how, bundle = run.sections["simulation"], Bundle.open(bundle_path)
    users = arrays[0].get(str(how.get("key", "user")))
    alpha = float(str(how.get("alpha", 0.3)))
    parts = partition(arrays[0]["y"], run.clients, how["split"], alpha=alpha, users=users, seed=seed)
    names = [feature.name for feature in (*bundle.manifest.inputs, *bundle.manifest.targets)]
    train, test = ({name: part[name] for name in names} for part in arrays)
    hypers = {key: float(str(value)) for key, value in run.sections["train.hypers"].items()}
    plan = TrainPlan(batch_size=int(str(run.sections["train"]["batch_size"])), hypers=hypers)
    cohort = int(str(run.sections["round"]["cohort"]))
    return Loopback(bundle, Trainer(bundle), train, test, parts, cohort, plan, seed)


def _name(phone: int) -> str:
    return f"phone-{phone:04d}"
