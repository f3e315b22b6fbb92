"""A run for people: a table of its rounds and a plot of accuracy and bytes."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from broker_server.metrics import ANSWERS, MEAN, SPREAD, WORST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

UNITS = ("B", "kB", "MB", "GB", "TB")

# Dark enough to read on white, apart in lightness too, so that a grey print still tells them apart.
INK, QUIET, UP, DOWN = "#1f2430", "#8a90a0", "#d1495b", "#1d6fa5"


class RoundRow(Protocol):
    """What is shown of a round; the ledger's rows are such."""

    @property
    def round(self) -> int:
        """Its number, from 1."""

    @property
    def clients(self) -> int:
        """Updates that were counted."""

    @property
    def seconds(self) -> float:
        """How long it took."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Means over the evaluation, such as ``accuracy`` and ``loss``; empty for a round that was not evaluated."""

    @property
    def bytes_up(self) -> int:
        """Bytes that clients sent in this round."""

    @property
    def bytes_down(self) -> int:
        """Bytes that clients received in this round."""


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units, three digits: ``1.23 MB``."""
    power = 0
    # Rounds up before it chooses: 999,999 bytes are 1.00 MB, not 1000 kB.
    while power < len(UNITS) - 1 and float(f"{count:.3g}") >= 1000:
        count /= 1000
        power += 1
    if power == 0:
        return f"{count:.0f} B"
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {UNITS[power]}"


def beside(metric: str, metrics: Collection[str]) -> dict[str, str]:
    """Which of ``metrics`` say how ``metric`` is spread over clients, each with a heading for it."""
    base = metric if metric.startswith(("train_", "personal_")) else "client_" + metric.removeprefix("client_")
    found = {base + WORST: "worst\n10 %", base + SPREAD: "spread"}
    return {name: heading for name, heading in found.items() if name in metrics}


def brief(metrics: Mapping[str, float]) -> list[str]:
    """Metrics in words, by name; what clients have measured with how it is spread over them, in brackets."""
    told = []
    for name, value in sorted(metrics.items()):
        if name.endswith((MEAN, WORST, SPREAD)):
            continue
        if name == ANSWERS:
            told.append(f"evaluated by {value:.0f}")
            continue
        spread = "" if name.startswith("train_") else _spread(name, metrics)
        told.append(f"{name} {value:.4f}{spread}")
    return told


def table(rounds: Sequence[RoundRow], *, metric: str = "accuracy", title: str | None = None) -> "Table":
    """A rich table: a line a round, and the sums below; where clients evaluate, also how fair the metric is to them."""
    from rich.table import Table

    up, down = (sum(getattr(row, name) for row in rounds) for name in ("bytes_up", "bytes_down"))
    values = {metric: metric} | beside(metric, {name for row in rounds for name in row.metrics})
    own = "personal_" + metric.removeprefix("client_")
    # Where layers are personal both are of the same model.
    if any(row.metrics[own] != row.metrics.get(metric) for row in rounds if own in row.metrics):
        values[own] = "personal"
    last = {name: next((row.metrics[name] for row in reversed(rounds) if name in row.metrics), None) for name in values}
    columns = {
        "round": str(len(rounds)),
        **{heading: _value(last[name]) for name, heading in values.items()},
        "clients": str(sum(row.clients for row in rounds)),
        "seconds": f"{sum(row.seconds for row in rounds):.1f}",
        "up": human_bytes(up),
        "down": human_bytes(down),
    }
    # A terminal of 80 characters has room for all of them.
    shown = Table(
        title=title, show_footer=True, header_style="bold", footer_style="bold", padding=(0, int(len(columns) < 9))
    )
    for name, footer in columns.items():
        shown.add_column(name, footer, justify="right", no_wrap=True)
    for row in rounds:
        shown.add_row(
            str(row.round),
            *(_value(row.metrics.get(name)) for name in values),
            str(row.clients),
            f"{row.seconds:.2f}",
            human_bytes(row.bytes_up),
            human_bytes(row.bytes_down),
        )
    return shown


def plot_run(
    rounds: Sequence[RoundRow],
    path: Path,
    *,
    fp32_bytes_up: int,
    fp32_bytes_down: int,
    metric: str = "accuracy",
    target: float | None = None,
    title: str = "",
) -> None:
    """Draw a run: its metric by round, and its bytes so far beside what fp32 FedAvg would have moved.

    Args:
        rounds: at least one, in order.
        path: where to write; its suffix says the format (``.png``, ``.svg``, ``.pdf``).
        fp32_bytes_up: bytes that the same updates take at 4 bytes a parameter, over the whole run.
        fp32_bytes_down: the same for the models that went down.
        metric: what the left panel shows; rounds without it are left out.
        target: a value of the metric to mark.
        title: what was trained, in a few words.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A Figure of its own: no pyplot, no global state, no display.
    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=14, fontweight="bold")
    _draw_metric(left, rounds, metric, target)
    _draw_bytes(right, rounds, fp32_bytes_up, fp32_bytes_down)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_metric(axes: "Axes", rounds: Sequence[RoundRow], metric: str, target: float | None) -> None:
    points = [(row.round, row.metrics[metric]) for row in rounds if metric in row.metrics]
    _style(axes, metric.replace("_", " ").capitalize(), rounds)
    if points:
        numbers, values = (np.array(column, float) for column in zip(*points, strict=True))
        marker = "o" if len(points) <= 40 else None
        axes.plot(numbers, values, color=INK, linewidth=2, marker=marker, markersize=4, clip_on=False, zorder=3)
        best = int(values.argmax() if metric != "loss" else values.argmin())
        above = metric != "loss"
        axes.annotate(
            f"{values[best]:.1%}" if metric == "accuracy" else f"{values[best]:.3g}",
            (numbers[best], values[best]),
            (0, 9 if above else -9),
            textcoords="offset points",
            ha="right" if numbers[best] == rounds[-1].round else "center",
            va="bottom" if above else "top",
            color=INK,
            fontweight="bold",
        )
    if metric == "accuracy":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if target is not None:
        axes.axhline(target, color=QUIET, linewidth=1.2, linestyle=(0, (5, 4)), zorder=2)
        label = f"target {target:.0%}" if metric == "accuracy" else f"target {target:g}"
        axes.annotate(
            label,
            (0.01, target),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left",
            va="bottom",
            color=QUIET,
            fontsize=9,
        )


def _draw_bytes(axes: "Axes", rounds: Sequence[RoundRow], fp32_up: int, fp32_down: int) -> None:
    numbers = np.array([row.round for row in rounds])
    up = np.cumsum([row.bytes_up for row in rounds])
    down = np.cumsum([row.bytes_down for row in rounds])
    # What fp32 takes grows with the clients of each round.
    clients = np.array([row.clients for row in rounds], float)
    share = np.cumsum(clients) / max(clients.sum(), 1.0)
    _style(axes, "Bytes so far", rounds)
    axes.set_yscale("log")
    references = [("up", fp32_up, UP), ("down", fp32_down, DOWN)]
    if abs(fp32_up - fp32_down) <= 0.15 * max(fp32_up, fp32_down):
        references = [("each way", (fp32_up + fp32_down) // 2, QUIET)]
    labels: list[tuple[float, str, str]] = []
    for name, total, color in references:
        axes.plot(numbers, total * share, color=color, linewidth=1.6, linestyle=(0, (5, 3)), zorder=2)
        labels.append((total, f"fp32 FedAvg {name}\n{human_bytes(total)}", color))
    for name, moved, total, color in (("up", up, fp32_up, UP), ("down", down, fp32_down, DOWN)):
        axes.plot(numbers, moved, color=color, linewidth=2.2, zorder=3)
        fewer = f", {total / moved[-1]:.3g}x fewer" if moved[-1] else ""
        labels.append((float(moved[-1]), f"{name}\n{human_bytes(moved[-1])}{fewer}", color))
    _label_ends(axes, numbers[-1], labels)
    axes.yaxis.set_major_formatter(lambda value, _: human_bytes(value).replace(".00 ", " ").replace(".0 ", " "))


def _label_ends(axes: "Axes", where: float, labels: list[tuple[float, str, str]]) -> None:
    """Names beside the ends of lines, instead of a legend; those that would touch are moved apart."""
    low, high = axes.get_ylim()
    span = np.log10(high / low)
    least = 0.12 * span
    heights: list[float] = []
    for value, text, color in sorted(labels):
        height = float(np.log10(max(value, low)))
        if heights:
            height = max(height, heights[-1] + least)
        heights.append(height)
        axes.annotate(
            text,
            (where, 10**height),
            (7, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            color=color,
            fontsize=9.5,
            annotation_clip=False,
        )


def _style(axes: "Axes", title: str, rounds: Sequence[RoundRow]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=10)
    axes.set_xlabel("round", color=QUIET)
    axes.set_xlim(rounds[0].round - 0.5 * (len(rounds) == 1), rounds[-1].round + 0.5 * (len(rounds) == 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(which="both", colors=QUIET, labelsize=9, length=0)
    axes.grid(axis="y", color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9cdd8")


def _spread(name: str, metrics: Mapping[str, float]) -> str:
    found = {
        word: metrics[name + end] for word, end in (("worst 10 %", WORST), ("spread", SPREAD)) if name + end in metrics
    }
    return f" ({', '.join(f'{word} {value:.4f}' for word, value in found.items())})" if found else ""


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
