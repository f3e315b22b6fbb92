"""Updates as clients send them, for the codec's benchmark: real ones from non-IID federations, and synthetic vectors.

A federation runs in one process, without a broker: clients hold the version they last received, train one local epoch,
add what error feedback kept for them, encode with the product's codec; the server takes the weighted mean and codes
the next version. What three clients of an early, a middle and a late round are about to encode is kept in
``build/bench/updates``: the parameters' delta and the residual together.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from federations import BUILD, ROUNDS, RUNS, Run, data, export
from stored import Update

from broker_server.coding import Coder
from broker_server.config import Codec
from broker_server.selection import Candidate, select
from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout, TensorSpec, Vector
from edge_client.codec.update import CodecSettings, decode_update, encode_update
from edge_client.codec.versions import CodedState
from edge_client.data import Arrays, ArraySource
from edge_client.emulator.partition import Indices, partition
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan

FOLDER = BUILD / "bench" / "updates"
CLIENTS = 3
"""Updates kept of a round."""
SIDE = int(os.environ.get("FEDGE_SIDE", "1000"))
"""Synthetic vectors are one square tensor; a test wants a small one."""

TRANSFORMER = Run(
    "shakespeare-64",
    ("export.models.transformer:char_transformer", "--input", "64", "--input-dtype", "int64"),
    clients=141,
    rounds=41,
    sections=RUNS["shakespeare"].sections | {"train.hypers": {"lr": 0.5}},
)


@dataclass(frozen=True)
class Origin:
    """A federation, and the rounds (from 0) at which updates are kept."""

    title: str
    run: Run
    rounds: tuple[int, ...]


ORIGINS = {
    "cnn": Origin("McMahan CNN, Fashion-MNIST", RUNS["fashion-mnist"], (2, 12, 30)),
    "gru": Origin("GRU, Shakespeare", RUNS["shakespeare"], (2, 15, 40)),
    "transformer": Origin("transformer, Shakespeare", TRANSFORMER, (2, 15, 40)),
}
SYNTHETIC: dict[str, Callable[[np.random.Generator, int], Vector]] = {
    "gaussian": lambda rng, n: rng.standard_normal(n, np.float32),
    "laplace": lambda rng, n: rng.laplace(size=n).astype(np.float32),
}


@dataclass(frozen=True)
class Federation:
    """Who trains what, and how."""

    bundle: Bundle
    arrays: Arrays
    """Training samples of all clients."""
    parts: Sequence[Indices]
    """Rows of each client."""
    cohort: int
    plan: TrainPlan
    codec: CodecSettings = field(default_factory=CodecSettings)
    seed: int = 0

    def updates(self, rounds: int) -> Iterator[tuple[int, Update]]:
        """Round and update of every client that is asked, round after round."""
        layout, base, trainer = self.bundle.layout, self.bundle.initial(), Trainer(self.bundle)
        state, rate = CodedState(layout), Codec()
        coder = Coder.after(state, 0, rate.model_noise)
        residuals: dict[int, Vector] = {}
        exact, pace = np.zeros(layout.size), 0.0
        for number in range(rounds):
            model = state.parameters(base)
            total, weight = np.zeros(layout.size), 0
            for client in self._cohort(number):
                local = model.copy()
                source = ArraySource(self.arrays, self.parts[client])
                result = trainer.train(local, source, self.plan, seed=self._draw(number, client))
                vector = local - model
                if client in residuals:
                    vector += residuals[client]
                yield number, Update(vector, layout)
                encoded = encode_update({"delta": vector}, {"delta": layout}, {}, self.codec)
                residuals[client] = encoded.residual
                received = decode_update(encoded.data, {"delta": layout}).vectors["delta"]
                total += result.samples * received.astype(np.float64)
                weight += result.samples
            step = total / weight
            exact += step
            pace += (float(step.std()) - pace) / min(number + 1, 10)
            state, coder = coder.encode(exact, rate.model_step * pace)

    def _cohort(self, number: int) -> list[int]:
        everyone = [Candidate(f"{client:06d}") for client in range(len(self.parts))]
        return [int(client) for client in select(everyone, self.cohort, random.Random(f"{self.seed}/{number}"))]

    def _draw(self, number: int, client: int) -> int:
        return int(np.random.SeedSequence([self.seed, number, client]).generate_state(1)[0]) >> 1


def federation(name: str) -> Federation:
    """One of ``ORIGINS``, exported and its data divided."""
    run = ORIGINS[name].run
    train, _ = data(run)
    with np.load(train) as file:
        arrays = dict(file)
    how = run.sections["simulation"]
    users = arrays.pop("user", None)
    alpha = float(str(how.get("alpha", 0.3)))
    parts = partition(arrays["y"], run.clients, how["split"], alpha=alpha, users=users)
    hypers = {key: float(str(value)) for key, value in run.sections["train.hypers"].items()}
    plan = TrainPlan(batch_size=int(str(run.sections["train"]["batch_size"])), hypers=hypers)
    bundle = Bundle.open(export(run, FOLDER / f"{name}.model"))
    return Federation(bundle, arrays, parts, int(str(run.sections["round"]["cohort"])), plan)


def collect(name: str) -> dict[str, list[Path]]:
    """Files with the updates of a federation or of a synthetic source, by ``name, round``; made where they are missing.

    Synthetic vectors are one tensor, and come once: the law of large numbers makes one as good as three.
    """
    if name in SYNTHETIC:
        return {name: [_synthetic(name)]}
    wanted = ORIGINS[name].rounds
    if ROUNDS:
        wanted = tuple(number for number in wanted if number < ROUNDS) or (ROUNDS - 1,)
    paths = {number: [FOLDER / f"{name}-{number}-{place}.npz" for place in range(CLIENTS)] for number in wanted}
    missing = {number: iter(kept) for number, kept in paths.items() if not all(path.exists() for path in kept)}
    if missing:
        print(f"{name}: {max(missing) + 1} rounds of training", flush=True)
        for number, update in federation(name).updates(max(missing) + 1):
            path = next(missing.get(number, iter(())), None)
            if path is not None:
                update.write(path)
    return {f"{name}, round {number}": kept for number, kept in paths.items()}


def _synthetic(name: str) -> Path:
    path = FOLDER / f"{name}-{SIDE}.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        Update(SYNTHETIC[name](rng, SIDE * SIDE), Layout((TensorSpec("weight", (SIDE, SIDE)),))).write(path)
    return path
