"""Part 1: rounds until the models of McMahan et al. 2017 are as accurate as in its tables, on MNIST over 100 clients.

Of table 1 the 2NN's row C = 0.1, of table 2 the CNN's rows B = 10 (Communication-Efficient Learning of Deep Networks
from Decentralized Data, arXiv 1602.05629): plain FedAvg, 10 clients a round, batches of 10. As there, the learning rate
is the best of a grid for each row, and a target is reached with the first round whose accuracy on the 10,000 test
images is as high.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.learning.figures import rounds_to
from tests.bench.learning.plots import INK, QUIET, panels, save
from tests.bench.learning.trials import Bench, Result, Trial, accuracy, traffic

CODECS = ("quantized", "none")
MOMENTUM = 0.5
"""Quantization delays what clients learn, and momentum makes up for that."""
SPLITS = {"iid": {"simulation.split": "iid"}, "shards": {"simulation.split": "shards", "simulation.shards": 2}}
COLORS = {"quantized": "#c1121f", "none": "#1d3557"}


@dataclass(frozen=True)
class Row:
    """One figure of the paper's."""

    model: str
    split: str
    epochs: int
    target: float
    paper_rounds: int
    grid: tuple[tuple[float, float], ...]
    """Learning rates of clients to try, each with a momentum of the server."""
    default: bool = True
    """Whether the run without ``FULL=1`` has it."""


ROWS = (
    Row("2nn", "iid", 1, 0.97, 87, ((0.1, 0.0), (0.2, 0.0), (0.3, 0.0))),
    Row("2nn", "shards", 1, 0.97, 664, ((0.05, 0.0), (0.1, 0.0))),
    Row("cnn", "iid", 1, 0.99, 34, ((0.2, 0.0), (0.2, MOMENTUM))),
    Row("cnn", "iid", 5, 0.99, 20, ((0.1, MOMENTUM),)),
    Row("cnn", "shards", 1, 0.99, 350, ((0.05, 0.0), (0.1, 0.0)), default=False),
    Row("cnn", "shards", 5, 0.99, 229, ((0.05, 0.0), (0.1, 0.0)), default=False),
)


def trials(row: Row, codec: str) -> dict[tuple[float, float], Trial]:
    """By learning rate and momentum; each ends at the target, or where the paper's has reached it."""
    return {(rate, momentum): trial(row, codec, rate, momentum) for rate, momentum in row.grid}


def trial(row: Row, codec: str, rate: float, momentum: float) -> Trial:
    """One setting of a row."""
    moved = {"server.options.momentum": momentum} if momentum else {}
    return Trial(
        f"{row.model}-{row.split}-{row.epochs}-{codec}-{rate:g}" + (f"-{momentum:g}" if momentum else ""),
        row.model,
        "mnist",
        {
            **SPLITS[row.split],
            **moved,
            "simulation.clients": 100,
            "round.cohort": 10,
            "train.batch_size": 10,
            "train.epochs": row.epochs,
            "train.hypers.lr": rate,
            "codec.kind": codec,
            "stop.target": row.target,
            "stop.rounds": row.paper_rounds,
        },
    )


def measure(bench: Bench, full: bool) -> dict[str, Any]:
    """The fields ``mcmahan`` and ``mcmahan_tried``: each row with its best learning rate, and all that were tried."""
    rows = [row for row in ROWS if full or row.default]
    grid = {(row, codec): trials(row, codec) for row in rows for codec in CODECS}
    found = bench.run([one for rates in grid.values() for one in rates.values()])
    best, tried = [], []
    for (row, codec), rates in grid.items():
        lines = [line(row, codec, *setting, found[one.name]) for setting, one in rates.items()]
        tried += lines
        best.append(min(lines, key=lambda one: (one["rounds"] or row.paper_rounds + 1, -one["accuracy"])))
    return {"mcmahan": best, "mcmahan_tried": tried}


def line(row: Row, codec: str, rate: float, momentum: float, result: Result) -> dict[str, Any]:
    """One run's fields; ``rounds`` is None where it stayed below the target."""
    curve = accuracy(result)
    rounds = rounds_to(curve, row.target)
    return {
        "model": row.model,
        "split": row.split,
        "epochs": row.epochs,
        "codec": codec,
        "target": row.target,
        "paper_rounds": row.paper_rounds,
        "rounds": rounds,
        "lr": rate,
        "momentum": momentum,
        "seed": 0,
        "accuracy": max(curve),
        "bytes": traffic(result)[-1],
        "seconds": result["seconds"],
        "curve": curve,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy over rounds: a panel for each row, the paper's figure as a cross of lines."""
    cases = list(dict.fromkeys((one["model"], one["split"], one["epochs"]) for one in found["mcmahan"]))
    figure, axes = panels(len(cases))
    for axis, (model, split, epochs) in zip(axes, cases, strict=True):
        lines = [
            one for one in found["mcmahan"] if (one["model"], one["split"], one["epochs"]) == (model, split, epochs)
        ]
        target, paper = lines[0]["target"], lines[0]["paper_rounds"]
        axis.axhline(target, color=QUIET, lw=1, ls=":")
        axis.axvline(paper, color=QUIET, lw=1, ls=":")
        for one in lines:
            curve = one["curve"]
            label = "codec on" if one["codec"] == "quantized" else "fp32"
            axis.plot(
                range(1, len(curve) + 1), curve, color=COLORS[one["codec"]], lw=1.4, label=f"{label}, lr {one['lr']:g}"
            )
        axis.set(xlabel="round", ylim=(target - 0.12, target + 0.012))
        axis.set_title(f"{model.upper()}, {split}, E = {epochs}", color=INK, fontsize=9)
        axis.legend(loc="lower right", frameon=False, fontsize=8)
    axes[0].set_ylabel("test accuracy")
    save(figure, path)
