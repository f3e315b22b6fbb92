"""Part 2: every algorithm, each tuned by the same number of trials, where clients have few classes and where they have
handwritings.

Fashion-MNIST over 100 clients by Dirichlet(0.1), and MNIST by its 539 writers. The trials of the tuning have the first
seed; the setting with the best accuracy at the end runs with the other seeds too. A target is what FedAvg has at its
end. Clients keep a fifth of their samples aside, and evaluate the last model on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_server.metrics import MEAN, SPREAD, WORST
from tests.bench.learning.figures import deviation, mean, rounds_to, smoothed
from tests.bench.learning.plots import COLORS, INK, panels, save
from tests.bench.learning.trials import Bench, Result, Settings, Trial, accuracy, traffic

SEEDS = (0, 1, 2)
WINDOW = 10
"""Rounds whose mean accuracy counts: with so few classes a client, single ones differ by points."""
TRIALS = 3
"""Of each algorithm."""
MODEL = "mlp"


@dataclass(frozen=True)
class Case:
    """A data set and how it lies with the clients."""

    data: str
    settings: Settings
    rates: tuple[float, ...]
    """Clients' learning rates, the first two of them for those that have something else to tune."""


CASES: Mapping[str, Case] = {
    "fashion-mnist": Case(
        "fashion-mnist",
        {
            "simulation.clients": 100,
            "simulation.split": "dirichlet",
            "simulation.alpha": 0.1,
            "round.cohort": 10,
            "train.batch_size": 32,
            "train.epochs": 5,
            "stop.rounds": 50,
        },
        (0.1, 0.03, 0.2),
    ),
    "mnist-writers": Case(
        "mnist-writers",
        {
            "simulation.clients": 539,
            "simulation.split": "natural",
            "simulation.key": "user",
            "round.cohort": 20,
            "train.batch_size": 10,
            "stop.rounds": 30,
        },
        (0.3, 0.1, 0.2),
    ),
}
HOLDOUT = 0.2


@dataclass(frozen=True)
class Method:
    """An algorithm and what is tuned of it."""

    settings: Settings
    tuned: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    """Two values of one setting, at the first learning rate and then at the second; else the learning rate is tuned."""
    options: tuple[str, ...] = ()
    """Of the export."""


def adaptive(optimizer: str, *rates: float) -> Method:
    """A server optimizer of Reddi et al. 2021."""
    low, high = rates
    return Method({"server.optimizer": optimizer}, {"server.learning_rate": (low, high)})


METHODS: Mapping[str, Method] = {
    "FedAvg": Method({}),
    "FedAvgM": Method({}, {"server.options.momentum": (0.5, 0.9)}),
    "FedAdam": adaptive("adam", 0.01, 0.03),
    "FedYogi": adaptive("yogi", 0.01, 0.03),
    "FedAdagrad": adaptive("adagrad", 0.03, 0.1),
    "FedProx": Method({}, {"train.hypers.mu": (0.01, 0.1)}, ("proximal",)),
    "FedNova": Method({"aggregation.algorithm": "fednova"}),
    "q-FedAvg": Method({"aggregation.algorithm": "qfedavg"}, {"aggregation.options.q": (0.1, 1.0)}),
    "SCAFFOLD": Method({"aggregation.algorithm": "scaffold"}, {"server.learning_rate": (1.0, 0.5)}, ("control",)),
    "FedDyn": Method(
        {"aggregation.algorithm": "feddyn"}, {"aggregation.options.alpha": (0.01, 0.1)}, ("proximal", "control")
    ),
}
WINNERS = ("FedAdam", "FedYogi", "FedAdagrad", "SCAFFOLD", "FedDyn")
"""Of which one is to be 2 points better than FedAvg, or to need half its rounds."""


def variants(case: Case, method: Method) -> dict[str, Settings]:
    """The settings to try, by what is tuned of them."""
    found: dict[str, Settings] = {}
    crossed = [(key, value) for key, values in method.tuned.items() for value in values]
    for rate in case.rates[:2] if crossed else case.rates:
        alone: Settings = {**method.settings, "train.hypers.lr": rate}
        for key, value in crossed:
            found[f"lr {rate:g}, {key.rpartition('.')[2]} {value}"] = {**alone, key: value}
        if not crossed:
            found[f"lr {rate:g}"] = alone
    return dict(list(found.items())[:TRIALS])


def trial(case: str, method: str, variant: str, seed: int) -> Trial:
    """One setting of one algorithm."""
    one = CASES[case]
    name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in f"{method} {variant}")
    return Trial(
        f"{case}-{name}-{seed}",
        "+".join((MODEL, *METHODS[method].options)),
        one.data,
        {**one.settings, "simulation.holdout": HOLDOUT, **variants(one, METHODS[method])[variant]},
        seed,
        final={"evaluation.clients": one.settings["simulation.clients"]},
    )


def measure(bench: Bench, full: bool) -> dict[str, Any]:
    """The field ``algorithms``: for each case a line an algorithm, and its trials."""
    del full
    return {"algorithms": {"seeds": SEEDS, "window": WINDOW, "cases": {name: compare(bench, name) for name in CASES}}}


def compare(bench: Bench, case: str) -> dict[str, Any]:
    """One data set's fields."""
    grid = {
        (method, variant): trial(case, method, variant, SEEDS[0])
        for method in METHODS
        for variant in variants(CASES[case], METHODS[method])
    }
    found = bench.run(list(grid.values()))
    tried: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for (method, variant), one in grid.items():
        tried[method][variant] = end(found[one.name])
    best = {method: max(ends, key=lambda variant: ends[variant]) for method, ends in tried.items()}
    again = {(method, seed): trial(case, method, best[method], seed) for method in METHODS for seed in SEEDS}
    found = bench.run(list(again.values()))
    targets = {seed: end(found[again["FedAvg", seed].name]) for seed in SEEDS}
    lines = {
        method: line({seed: found[again[method, seed].name] for seed in SEEDS}, targets) | {"best": best[method]}
        for method in METHODS
    }
    base = lines["FedAvg"]
    for one in lines.values():
        one["points"] = 100 * (one["accuracy"] - base["accuracy"])
        one["rounds_ratio"] = one["rounds"] / base["rounds"] if one["rounds"] else None
    winners = [name for name in WINNERS if lines[name]["points"] >= 2 or (lines[name]["rounds_ratio"] or 1) <= 0.5]
    return {"settings": dict(CASES[case].settings), "tried": tried, "lines": lines, "winners": winners}


def end(result: Result) -> float:
    """The mean accuracy of the last rounds on the test set, but for the one in which clients evaluate too."""
    return smoothed(accuracy(result)[:-1], WINDOW)[-1]


def line(results: Mapping[int, Result], targets: Mapping[int, float]) -> dict[str, Any]:
    """An algorithm's fields, over its seeds; ``rounds`` and ``bytes`` are None where one stayed below its target."""
    curves = {seed: smoothed(accuracy(result)[:-1], WINDOW) for seed, result in results.items()}
    rounds = {seed: rounds_to(curve, targets[seed]) for seed, curve in curves.items()}
    whole = [number for number in rounds.values() if number is not None]
    reached = len(whole) == len(results)
    last = [result["rounds"][-1]["metrics"] for result in results.values()]
    ends = [curve[-1] for curve in curves.values()]
    return {
        "accuracy": mean(ends),
        "deviation": deviation(ends),
        "rounds": mean(whole) if reached else None,
        "bytes": mean([traffic(results[seed])[number - 1] for seed, number in rounds.items() if number])
        if reached
        else None,
        **{
            f"client_accuracy{figure}": mean([one[f"client_accuracy{figure}"] for one in last])
            for figure in (MEAN, WORST, SPREAD)
        },
        "seeds": {str(seed): {"accuracy": curves[seed][-1], "rounds": rounds[seed]} for seed in results},
        "curve": [mean(values) for values in zip(*curves.values(), strict=False)],
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Smoothed accuracy over rounds, a panel for each case."""
    cases = found["algorithms"]["cases"]
    figure, axes = panels(len(cases), 4.2, 3.6)
    for axis, (name, case) in zip(axes, cases.items(), strict=True):
        for (method, one), color in zip(case["lines"].items(), COLORS, strict=True):
            curve = one["curve"]
            width = 2.0 if method == "FedAvg" else 1.2
            axis.plot(range(1, len(curve) + 1), curve, color=color, lw=width, label=method)
        top = max(one["accuracy"] for one in case["lines"].values())
        axis.set(xlabel="round", ylim=(top - 0.25, top + 0.02))
        axis.set_title(name, color=INK, fontsize=9)
    axes[0].set_ylabel(f"test accuracy, mean of {WINDOW} rounds")
    axes[-1].legend(loc="lower right", frameon=False, fontsize=8)
    save(figure, path)
