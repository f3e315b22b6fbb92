"""Part 5: FedBuff against rounds with over-selection and a deadline, on phones of which one is 20 times as fast as
another.

Fashion-MNIST over 100 phones by Dirichlet(0.5); of these at most 40 train at once. A training takes the fastest phone
half a second and the slowest ten (`phones`), speeds are log-uniform between. Both ways are tuned by the same number of
trials with the first seed, and what counts is the time until the mean accuracy of the last five versions is at the
target. Synchronous rounds are tuned in how many updates they wait for, how many more phones they ask, and how long they
wait; FedBuff in how many phones train at once, how many updates make a version, and how old ones count.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.learning.figures import mean, rounds_to, smoothed
from tests.bench.learning.plots import INK, QUIET, panels, save
from tests.bench.learning.trials import Bench, Result, Settings, Trial, accuracy

SEEDS = (0, 1, 2)
TARGET = 0.78
SECONDS = 120.0
"""Of each trial."""
JOBS = 1
"""Trials at once for each core: they mostly wait, and must not wait for each other."""
COMMON: Settings = {
    "simulation.clients": 100,
    "simulation.split": "dirichlet",
    "simulation.alpha": 0.5,
    "simulation.speed": [0.05, 1.0],
    "train.batch_size": 32,
    "train.hypers.lr": 0.1,
    "stop.rounds": 100_000,
    "stop.seconds": SECONDS,
}


def rounds(cohort: int, over_select: float, deadline: float) -> Settings:
    """Synchronous rounds."""
    return {
        "round.cohort": cohort,
        "round.over_select": over_select,
        "round.deadline": deadline,
        "round.minimum": cohort // 2,
    }


def fedbuff(concurrency: int, buffer: int, staleness: float) -> Settings:
    """Versions without rounds."""
    return {
        "round.mode": "buffered",
        "round.concurrency": concurrency,
        "round.buffer": buffer,
        "round.staleness": staleness,
    }


GRIDS: Mapping[str, Mapping[str, Settings]] = {
    "synchronous": {
        f"{cohort} of {over} times, {deadline:g} s": rounds(cohort, over, deadline)
        for cohort, over, deadline in (
            (10, 1.0, 5.0),
            (10, 1.3, 5.0),
            (10, 1.3, 12.0),
            (10, 1.5, 5.0),
            (10, 2.0, 5.0),
            (20, 2.0, 5.0),
        )
    },
    "fedbuff": {
        f"{concurrency} at once, {buffer} a version, staleness {staleness:g}": fedbuff(concurrency, buffer, staleness)
        for concurrency, buffer, staleness in (
            (20, 4, 0.5),
            (20, 5, 0.5),
            (20, 5, 1.0),
            (20, 10, 0.5),
            (30, 10, 0.5),
            (40, 10, 0.5),
        )
    },
}


def trial(mode: str, name: str, seed: int) -> Trial:
    """One setting of the grids."""
    return Trial(
        f"{mode} {name} {seed}".replace(" ", "_"),
        "mlp",
        "fashion-mnist",
        {**COMMON, **GRIDS[mode][name]},
        seed,
        fleet="tests.bench.learning.phones",
        variables={"FEDGE_TRAINING_SECONDS": "0.5"},
        exact=False,
    )


def measure(bench: Bench, full: bool) -> dict[str, Any]:
    """The field ``buffered``: both grids, the best of each over all seeds, and the ratio of their times."""
    del full
    jobs = JOBS * bench.jobs
    grid = {(mode, name): trial(mode, name, SEEDS[0]) for mode, names in GRIDS.items() for name in names}
    found = bench.run(list(grid.values()), jobs)
    tried: dict[str, list[dict[str, Any]]] = {mode: [] for mode in GRIDS}
    for (mode, name), one in grid.items():
        tried[mode].append({"setting": name, **line(found[one.name])})
    best = {mode: min(lines, key=_slow)["setting"] for mode, lines in tried.items()}
    again = {(mode, seed): trial(mode, name, seed) for mode, name in best.items() for seed in SEEDS}
    found = bench.run(list(again.values()), jobs)
    runs = {mode: [line(found[again[mode, seed].name]) for seed in SEEDS] for mode in GRIDS}
    times = {mode: [one["seconds"] for one in lines] for mode, lines in runs.items()}
    reached = all(seconds is not None for values in times.values() for seconds in values)
    return {
        "buffered": {
            "target": TARGET,
            "settings": dict(COMMON),
            "seeds": SEEDS,
            "tried": tried,
            "best": best,
            "runs": runs,
            "seconds": {mode: mean(values) for mode, values in times.items()} if reached else None,
            "ratio": mean(times["fedbuff"]) / mean(times["synchronous"]) if reached else None,
        }
    }


def line(result: Result) -> dict[str, Any]:
    """A run's ``seconds`` until it reached the target, since it first asked clients; None where it did not."""
    curve = smoothed(accuracy(result))
    started = result["stamps"][0] - result["rounds"][0]["seconds"]
    stamps = [stamp - started for stamp in result["stamps"]]
    first = rounds_to(curve, TARGET)
    return {
        "seconds": None if first is None else stamps[first - 1],
        "versions": first,
        "staleness": mean([row["metrics"].get("staleness", 0.0) for row in result["rounds"]]),
        "updates_a_version": mean([row["clients"] for row in result["rounds"]]),
        "seconds_a_version": stamps[-1] / len(stamps),
        "accuracy": max(curve),
        "curve": list(zip(stamps, curve, strict=True)),
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy over time, a line for each seed."""
    figure, (axis,) = panels(1, 5.0)
    for (mode, lines), color in zip(found["buffered"]["runs"].items(), ("#1d3557", "#c1121f"), strict=True):
        for number, one in enumerate(lines):
            label = f"{mode}: {found['buffered']['best'][mode]}" if number == 0 else None
            axis.plot(*zip(*one["curve"], strict=True), color=color, lw=1.2, label=label)
    axis.axhline(TARGET, color=QUIET, lw=1, ls=":")
    axis.set(xlabel="seconds", ylabel="test accuracy", ylim=(0.5, 0.86))
    axis.set_title("time to accuracy on uneven phones", color=INK, fontsize=9)
    axis.legend(loc="lower right", frameon=False, fontsize=8)
    save(figure, path)


def _slow(one: dict[str, Any]) -> tuple[bool, float]:
    seconds = one["seconds"]
    return (seconds is None, -one["accuracy"] if seconds is None else seconds)
