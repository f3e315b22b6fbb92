"""Part 3: models of their own for clients, beside the global model and beside training alone.

MNIST over 200 of its writers, and Fashion-MNIST over 100 clients by Dirichlet(0.5). Each client keeps a third of its
samples aside, and is measured on them with the model that it would use. Alone, it trains as long as suits it on what it
has: nothing travels, so that this is done here, by the same trainer on the same samples as in the federations. Every
way is tuned by the same number of trials with the first seed, for the mean client's accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.metrics import MEAN, WORST, fairness
from edge_client.bundle import Bundle
from edge_client.data import ArraySource, split
from edge_client.emulator.partition import partition
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan
from tests.bench.learning.figures import deviation, mean
from tests.bench.learning.plots import COLORS, INK, panels, save
from tests.bench.learning.trials import Bench, Result, Settings, Trial

SEEDS = (0, 1, 2)
HOLDOUT = 1 / 3
HEAD = "3.*"
"""The last layer."""


@dataclass(frozen=True)
class Case:
    """A data set and how it lies with the clients."""

    data: str
    settings: Settings
    rate: float
    """Clients' learning rate, of all that is shared and of training alone."""

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return int(str(self.settings["train.batch_size"]))

    @property
    def clients(self) -> int:
        """How many there are."""
        return int(str(self.settings["simulation.clients"]))


CASES: Mapping[str, Case] = {
    "mnist-writers": Case(
        "mnist-writers",
        {
            "simulation.clients": 200,
            "simulation.split": "natural",
            "simulation.key": "user",
            "round.cohort": 20,
            "train.batch_size": 10,
            "stop.rounds": 40,
        },
        0.3,
    ),
    "fashion-mnist": Case(
        "fashion-mnist",
        {
            "simulation.clients": 100,
            "simulation.split": "dirichlet",
            "simulation.alpha": 0.5,
            "round.cohort": 20,
            "train.batch_size": 32,
            "stop.rounds": 40,
        },
        0.1,
    ),
}


@dataclass(frozen=True)
class Way:
    """How clients come to the model that they use."""

    settings: Settings
    tuned: Mapping[str, tuple[object, object]]
    """Two values of one setting."""
    model: str = "mlp"
    personal: str = ""
    """What clients measure: their own model, or where empty the global one."""


WAYS: Mapping[str, Way] = {
    "global": Way({}, {"train.epochs": (3, 5)}),
    "FedRep": Way(
        {"personal.layers": [HEAD], "train.epochs": 3}, {"personal.head_epochs": (1, 5)}, personal="personal_"
    ),
    "FedBN": Way({"personal.layers": ["norm"]}, {"train.epochs": (3, 5)}, model="mlp-norm", personal="personal_"),
    "Ditto": Way(
        {"personal.method": "ditto", "train.epochs": 3, "personal.lambda": 0.03},
        {"personal.epochs": (3, 60)},
        model="mlp+proximal",
        personal="personal_",
    ),
}
ALONE = "alone"
ALONE_EPOCHS = (40, 100)
WINNERS = ("FedRep", "FedBN", "Ditto")


def trial(case: str, way: str, variant: object, seed: int) -> Trial:
    """A way with one value of what is tuned of it."""
    one, how = CASES[case], WAYS[way]
    ((key, _),) = how.tuned.items()
    return Trial(
        f"{case}-{way}-{variant}-{seed}",
        how.model,
        one.data,
        {
            **one.settings,
            "simulation.holdout": HOLDOUT,
            # Where some layers stay with the clients, the server has no model to measure.
            "evaluation.data": "",
            "train.hypers.lr": one.rate,
            **how.settings,
            key: variant,
        },
        seed,
        final={"evaluation.clients": one.clients},
    )


def measure(bench: Bench, full: bool) -> dict[str, Any]:
    """The field ``personal``: for each case a line a way, and the ways that beat both the global model and solitude."""
    del full
    return {"personal": {"seeds": SEEDS, "holdout": HOLDOUT, "cases": {name: compare(bench, name) for name in CASES}}}


def compare(bench: Bench, case: str) -> dict[str, Any]:
    """One data set's fields."""
    grid = {
        (way, variant): trial(case, way, variant, SEEDS[0])
        for way, how in WAYS.items()
        for variant in next(iter(how.tuned.values()))
    }
    found = bench.run(list(grid.values()))
    tried: dict[str, dict[Any, float]] = {way: {} for way in (*WAYS, ALONE)}
    for (way, variant), one in grid.items():
        tried[way][variant] = told(WAYS[way], found[one.name])[MEAN]
    tried[ALONE] = {epochs: alone(bench, case, epochs, SEEDS[0])[MEAN] for epochs in ALONE_EPOCHS}
    best = {way: max(ends, key=lambda variant: ends[variant]) for way, ends in tried.items()}
    again = {(way, seed): trial(case, way, best[way], seed) for way in WAYS for seed in SEEDS}
    found = bench.run(list(again.values()))
    runs = {way: [told(how, found[again[way, seed].name]) for seed in SEEDS] for way, how in WAYS.items()}
    runs[ALONE] = [alone(bench, case, best[ALONE], seed) for seed in SEEDS]
    lines = {
        way: {
            "tuned": best[way],
            "mean": mean([one[MEAN] for one in ends]),
            "worst": mean([one[WORST] for one in ends]),
            "mean_deviation": deviation([one[MEAN] for one in ends]),
            "worst_deviation": deviation([one[WORST] for one in ends]),
        }
        for way, ends in runs.items()
    }
    rivals = [lines["global"], lines[ALONE]]
    winners = [
        way for way in WINNERS if all(lines[way][key] > rival[key] for rival in rivals for key in ("mean", "worst"))
    ]
    return {
        "settings": {**CASES[case].settings, "train.hypers.lr": CASES[case].rate},
        "tried": {way: {str(variant): value for variant, value in ends.items()} for way, ends in tried.items()},
        "lines": lines,
        "winners": winners,
    }


def told(way: Way, result: Result) -> dict[str, float]:
    """Mean and worst tenth of the clients' accuracy, by `MEAN` and `WORST`, as the last round's clients told."""
    metrics = result["rounds"][-1]["metrics"]
    return {figure: metrics[f"{way.personal or 'client_'}accuracy{figure}"] for figure in (MEAN, WORST)}


def alone(bench: Bench, case: str, epochs: int, seed: int) -> dict[str, float]:
    """The same for clients that train by themselves, as `told`; kept as trials are."""
    path = bench.folder / bench.part / "alone" / f"{case}-{epochs}-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, accuracy=solitude(bench, case, epochs, seed))
        partial.replace(path)
    with np.load(path) as kept:
        figures = fairness("accuracy", kept["accuracy"].tolist())
    return {figure: figures[f"accuracy{figure}"] for figure in (MEAN, WORST)}


def solitude(bench: Bench, case: str, epochs: int, seed: int) -> list[float]:
    """Each client's accuracy on what it keeps aside, trained on the rest from the untrained model."""
    one = CASES[case]
    bundle = Bundle.open(bench.bundle("mlp"))
    trainer = Trainer(bundle)
    with np.load(bench.data(one.data)[0]) as file:
        arrays = dict(file)
    rows = partition(
        arrays["y"],
        one.clients,
        one.settings["simulation.split"],  # type: ignore[arg-type]
        alpha=float(str(one.settings.get("simulation.alpha", 1.0))),
        users=arrays.get("user"),
        seed=seed,
    )
    features = {name: arrays[name] for name in ("x", "y")}
    plan = TrainPlan(epochs=epochs, batch_size=one.batch, hypers={"lr": one.rate})
    found = []
    for number, mine in enumerate(rows):
        train, test = split(ArraySource(features, mine), HOLDOUT, seed + number)
        local = trainer.train(bundle.initial(), train, plan, seed=seed + number).local
        sums = trainer.evaluate(local, test)
        found.append(sums["correct"] / sums["count"])
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean client and worst tenth of each way, a panel for each case."""
    cases = found["personal"]["cases"]
    figure, axes = panels(len(cases), 4.0)
    for axis, (name, case) in zip(axes, cases.items(), strict=True):
        for place, one in enumerate(case["lines"].values()):
            axis.plot([place, place], [one["worst"], one["mean"]], color=COLORS[place], lw=2)
            axis.plot(place, one["mean"], "o", color=COLORS[place], ms=5)
            axis.plot(place, one["worst"], "v", color=COLORS[place], ms=5)
        axis.set_xticks(range(len(case["lines"])), labels=list(case["lines"]), rotation=45, ha="right", fontsize=8)
        axis.set_title(f"{name}: mean client (o), worst tenth (v)", color=INK, fontsize=9)
    axes[0].set_ylabel("accuracy on own held-out samples")
    save(figure, path)
