"""What the learning benchmark's plots share."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET = "#1f2430", "#8a90a0"
COLORS = ("#c1121f", "#1d3557", "#2a9d8f", "#8338ec", "#f4a261", "#555555", "#0077b6", "#bc6c25", "#d62976", "#606c38")


def panels(count: int, width: float = 3.1, height: float = 3.0) -> "tuple[Figure, list[Axes]]":
    """A row of panels; the same SVG for the same data."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fedge", "font.size": 9, "path.simplify_threshold": 1.0}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def save(figure: "Figure", path: Path) -> None:
    """Write the SVG."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
