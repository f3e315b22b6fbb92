"""The codec benchmark's plot: bits per parameter against NMSE, one panel for each kind of source."""

from pathlib import Path

from contenders import ecsq
from contenders.points import Point

TITLES = {
    "cnn": "McMahan CNN, Fashion-MNIST",
    "gru": "GRU, Shakespeare",
    "transformer": "transformer, Shakespeare",
    "gaussian": "Gaussian, synthetic",
    "laplace": "Laplace, synthetic",
}
STYLES = {
    "fedge": ("fedge", "#c1121f", "o-"),
    "nncodec": ("NNCodec 2.1", "#1d3557", "-"),
    "stc": ("STC", "#2a9d8f", "-"),
    "eden": ("EDEN", "#8338ec", "--"),
    "qsgd": ("QSGD", "#f4a261", "--"),
    "int8_zstd": ("int8 + zstd", "#555555", "s"),
}
THEORY = "scalar theory"
BITS, NMSE = (0.028, 8.0), (1e-3, 1.2)


def chosen(curves: dict[str, dict[str, list[Point]]]) -> dict[str, dict[str, list[Point]]]:
    """The middle round of each federation, and the Gaussian."""
    shown = {}
    for name in ("cnn", "gru", "transformer", "gaussian", "laplace"):
        rounds = [source for source in curves if source.split(",")[0] == name]
        if rounds:
            shown[rounds[len(rounds) // 2]] = curves[rounds[len(rounds) // 2]]
    return dict(list(shown.items())[:4])


def plot(curves: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Write an SVG, the same bytes for the same curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fedge", "font.size": 9, "path.simplify_threshold": 1.0}
    from matplotlib import pyplot as plt

    shown = chosen(curves)
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 3.2), sharey=True, squeeze=False)
    for axis, (source, by_codec) in zip(axes[0], shown.items(), strict=True):
        for name, (label, color, style) in reversed(STYLES.items()):
            points = _seen(by_codec.get(name, []))
            if points:
                width = 2.0 if name == "fedge" else 1.2
                axis.plot(*zip(*points, strict=True), style, color=color, label=label, lw=width, ms=3.5)
        if source == "gaussian":
            axis.plot(*zip(*_seen(list(ecsq.gaussian())[::20]), strict=True), "k:", lw=1, label=THEORY)
        name, _, rest = source.partition(",")
        axis.set(xscale="log", yscale="log", xlim=BITS, ylim=NMSE, xlabel="bits per parameter")
        axis.set_title(TITLES[name] + ("\n" + rest.strip() if rest else "\n"), fontsize=9)
        ticks = (0.05, 0.1, 0.3, 1, 3)
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("NMSE")
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(lines, key=[*(label for label, _, _ in STYLES.values()), THEORY].index)
    figure.legend(
        [lines[label] for label in labels], labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _seen(points: list[Point]) -> list[Point]:
    return [(bits, nmse) for bits, nmse in points if BITS[0] <= bits <= BITS[1] and NMSE[0] / 100 <= nmse <= 2]
