"""Part 4: a fifth of the clients attack, and aggregation rules that are made for it stand beside FedAvg.

Fashion-MNIST over 20 clients by Dirichlet(0.5), all of them in every round, four of them attackers: an update with its
sign flipped and ten times as long, flipped labels, or "a little is enough" (tests/byzantine.py). What counts is the
mean accuracy of the last rounds, and how far below clean FedAvg it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.learning.figures import WINDOW, deviation, mean, smoothed
from tests.bench.learning.plots import COLORS, INK, panels, save
from tests.bench.learning.trials import HONEST, Bench, Settings, Trial, accuracy

SEEDS = (0, 1, 2)
CLIENTS, ROUNDS = 20, 30
CLEAN = "none"
ATTACKS = (CLEAN, "sign flip", "label flip", "little is enough")
RULES: Mapping[str, Settings] = {
    "fedavg": {},
    "norm bounding": {"aggregation.norm": 1.0},
    "trimmed mean": {"aggregation.algorithm": "trimmed-mean"},
    "geometric median": {"aggregation.algorithm": "geometric-median"},
    "multi-krum": {"aggregation.algorithm": "multi-krum"},
}
ALLOWED = 0.02
"""How far below clean FedAvg a robust rule may be."""
COMMON: Settings = {
    "simulation.clients": CLIENTS,
    "simulation.split": "dirichlet",
    "simulation.alpha": 0.5,
    "round.cohort": CLIENTS,
    "round.minimum": 7,
    "train.batch_size": 32,
    "train.hypers.lr": 0.1,
    # Rules by element need every element.
    "codec.kind": "none",
    "stop.rounds": ROUNDS,
}


def trial(rule: str, attack: str, seed: int) -> Trial:
    """A rule under an attack."""
    hostile = attack != CLEAN
    return Trial(
        f"{rule} {attack} {seed}".replace(" ", "_"),
        "mlp",
        "fashion-mnist",
        {**COMMON, **RULES[rule]},
        seed,
        fleet="tests.attackers" if hostile else HONEST,
        variables={"FEDGE_ATTACK": attack, "FEDGE_ATTACKERS": "0.2"} if hostile else {},
        # A model that an attack has made infinite trains no more.
        exact=not hostile,
    )


def measure(bench: Bench, full: bool) -> dict[str, Any]:
    """The field ``attackers``: a line for each rule and attack, and whether some rule holds against each attack."""
    del full
    cases = [(rule, attack) for attack in ATTACKS for rule in RULES]
    found = bench.run([trial(*case, seed) for case in cases for seed in SEEDS])
    curves = {case: [accuracy(found[trial(*case, seed).name]) for seed in SEEDS] for case in cases}
    last = {case: [smoothed(curve)[-1] for curve in runs] for case, runs in curves.items()}
    clean = mean(last["fedavg", CLEAN])
    lines = [
        {
            "rule": rule,
            "attack": attack,
            "accuracy": mean(last[rule, attack]),
            "deviation": deviation(last[rule, attack]),
            "below_clean": clean - mean(last[rule, attack]),
            "curve": [mean(values) for values in zip(*curves[rule, attack], strict=False)],
        }
        for rule, attack in cases
    ]
    holding = {
        attack: [one["rule"] for one in lines if one["attack"] == attack and one["below_clean"] <= ALLOWED]
        for attack in ATTACKS
    }
    return {
        "attackers": {
            "settings": dict(COMMON),
            "rules": {rule: dict(settings) for rule, settings in RULES.items()},
            "seeds": SEEDS,
            "window": WINDOW,
            "clean_accuracy": clean,
            "within_two_points": holding,
            "cases": lines,
        }
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy over rounds, a panel for each attack."""
    figure, axes = panels(len(ATTACKS))
    for axis, attack in zip(axes, ATTACKS, strict=True):
        lines = [one for one in found["attackers"]["cases"] if one["attack"] == attack]
        for one, color in zip(lines, COLORS, strict=False):
            curve = one["curve"]
            axis.plot(range(1, len(curve) + 1), curve, color=color, lw=1.4, label=one["rule"])
        axis.set(xlabel="round", ylim=(0, 1))
        axis.set_title("no attack" if attack == CLEAN else attack, color=INK, fontsize=9)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(loc="lower right", frameon=False, fontsize=8)
    save(figure, path)
