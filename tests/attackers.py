"""A fleet of emulated phones of which some attack: ``python -m tests.attackers fleet.json``, as `edge_client.emulator`.

``simulate(..., fleet="tests.attackers")`` runs it in place of the honest one. ``FEDGE_ATTACK`` names what they do: one
of `byzantine.ATTACKS`, or ``label flip``; the first phones, ``FEDGE_ATTACKERS`` of all (0.2 unless given), do it.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_client.bundle import Bundle
from edge_client.codec.layout import Vector
from edge_client.data import DataSource
from edge_client.device import OpenData, Workshop
from edge_client.emulator import __main__ as program
from edge_client.emulator.fleet import Fleet, FleetSpec
from edge_client.manifest import Manifest
from edge_client.trainer import Trainer, TrainResult
from tests.byzantine import ATTACKS, label_flip

FLIP = "label flip"


class Mob:
    """Attackers who know each other's latest honest updates."""

    def __init__(self, attack: str, share: float, count: int) -> None:
        self._attack = ATTACKS[attack]
        self._share = share
        self._latest: deque[Vector] = deque(maxlen=count)
        self._lock = threading.Lock()

    def craft(self, own: Vector) -> Vector:
        """What one sends who has learned this."""
        with self._lock:
            self._latest.append(own)
            rows = np.stack(self._latest)
        return self._attack(rows, round(len(rows) / self._share))[-1]


@dataclass
class PoisonedTrainer:
    """Trains as others do, and then puts the attack in the place of what was learned."""

    honest: Trainer
    mob: Mob

    @property
    def bundle(self) -> Bundle:
        return self.honest.bundle

    def train(self, model: Vector, *arguments: Any, **more: Any) -> TrainResult:
        received = model.copy()
        result = self.honest.train(model, *arguments, **more)
        model[:] = received + self.mob.craft(model - received)
        return result

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        return self.honest.evaluate(*arguments, **more)


@dataclass
class PoisonedWorkshop:
    """The fleet's training slots, as attackers use them."""

    honest: Workshop
    mob: Mob

    def open(self, digest: bytes, data: bytes) -> Bundle:
        return self.honest.open(digest, data)

    async def run(self, job: Callable[[], Any]) -> Any:
        return await self.honest.run(job)

    def trainer(self, bundle: Bundle) -> PoisonedTrainer:
        return PoisonedTrainer(self.honest.trainer(bundle), self.mob)


@dataclass
class FlippedSource:
    """Samples with other labels."""

    honest: DataSource
    target: str
    classes: int

    @property
    def samples(self) -> int:
        return self.honest.samples

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Any]]:
        for batch in self.honest.batches(size, seed=seed):
            yield {**batch, self.target: label_flip(np.asarray(batch[self.target]), self.classes)}


def flipped(honest: OpenData) -> OpenData:
    """Data of which what is trained on has other labels."""

    def open_data(manifest: Manifest) -> tuple[DataSource, DataSource]:
        train, test = honest(manifest)
        return FlippedSource(train, manifest.targets[0].name, manifest.outputs[0].shape[-1]), test

    return open_data


class MixedFleet(Fleet):
    """Phones of which the first ones attack."""

    def __init__(self, spec: FleetSpec, log: Callable[[str], None]) -> None:
        super().__init__(spec, log)
        attack, share = os.environ["FEDGE_ATTACK"], float(os.environ.get("FEDGE_ATTACKERS", "0.2"))
        attackers = self.phones[: round(share * len(self.phones))]
        mob = None if attack == FLIP else Mob(attack, share, len(attackers))
        for phone in attackers:
            if mob is None:
                phone.open_data = flipped(phone.open_data)
            else:
                phone.workshop = PoisonedWorkshop(phone.workshop, mob)


if __name__ == "__main__":
    program.Fleet = MixedFleet
    program.main()
