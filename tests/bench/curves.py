"""Accuracy over rounds and bytes over rounds, and what a contender took to get as far as another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 5
"""Evaluations, one a round, whose mean counts: single ones go up and down by points from round to round."""
CLOSE = 0.005
"""What is this near is as good."""


@dataclass(frozen=True)
class Curve:
    """Of one run, round by round: ``accuracy`` on the test set, and all bytes up and down since its start."""

    accuracy: Sequence[float]
    total: Sequence[int]

    def smoothed(self) -> list[float]:
        """Mean of the last rounds' accuracy, at each round; of fewer than five where a run is shorter."""
        window = min(WINDOW, len(self.accuracy))
        means = np.convolve(self.accuracy, np.full(window, 1 / window), "valid")
        return [float("nan")] * (window - 1) + means.tolist()

    def reaches(self, accuracy: float) -> int | None:
        """The first round whose smoothed accuracy is close to ``accuracy`` or above."""
        rounds = [number for number, value in enumerate(self.smoothed(), 1) if value >= accuracy - CLOSE]
        return rounds[0] if rounds else None

    def at(self, accuracy: float) -> dict[str, Any]:
        """``rounds``, ``bytes`` and ``accuracy`` where it reaches that, or at its end, and whether it does."""
        found = self.reaches(accuracy)
        rounds = found or len(self.accuracy)
        return {
            "reached": found is not None,
            "rounds": rounds,
            "bytes": self.total[rounds - 1],
            "accuracy": self.smoothed()[rounds - 1],
        }


def compare(curves: Mapping[str, Sequence[Curve]], budget: int) -> dict[str, Any]:
    """A case's fields: bytes, rounds and accuracy of each contender (a curve for each seed, ``fp32`` one of them).

    A seed's target is what fp32 FedAvg has after ``budget`` rounds. Bytes, rounds and accuracies are means over the
    seeds; where a contender misses the target with one of them they are those at its end, and its factor is None.
    """
    targets = [curve.smoothed()[min(budget, len(curve.accuracy)) - 1] for curve in curves["fp32"]]
    found: dict[str, Any] = {"budget": budget, "target_accuracy": float(np.mean(targets)), "seeds": {}}
    for name, runs in curves.items():
        seeds = [curve.at(target) for curve, target in zip(runs, targets, strict=True)]
        found["seeds"][name] = seeds
        for key in ("bytes", "rounds", "accuracy"):
            found[f"{name}_{key}"] = float(np.mean([seed[key] for seed in seeds]))
        found[f"{name}_reached"] = all(seed["reached"] for seed in seeds)
    for name in curves:
        if name != "fp32":
            ratio = found["fp32_bytes"] / found[f"{name}_bytes"]
            found[f"{name}_factor"] = ratio if found[f"{name}_reached"] else None
            found[f"{name}_lag"] = found[f"{name}_rounds"] / found["fp32_rounds"]
    return found
