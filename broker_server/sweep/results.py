"""Results of a sweep as files and as a table for people."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from broker_server.report import human_bytes
from broker_server.sweep.figures import Row
from broker_server.sweep.grid import short_names
from edge_client.errors import ConfigError

_BEST = "bold green"


def write_csv(path: Path, found: Sequence[Row]) -> None:
    """Write lines with equal columns, whole or not at all; what is None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, found[0] if found else ["name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    _replace(path, text.getvalue().encode())


def write_parquet(path: Path, found: Sequence[Row]) -> None:
    """Write the same lines as Parquet; a column with values of several kinds becomes one of texts.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    need("pyarrow", "--parquet")
    import pyarrow
    from pyarrow import parquet

    columns = {name: _one_kind([row[name] for row in found]) for name in (found[0] if found else [])}
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    _replace(path, sink.getvalue())


def need(package: str, option: str) -> None:
    """Refuse an option whose package is not there.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(f"{option} needs {package}, which is not installed here: pip install {package}")


def summary_table(
    lines: Sequence[Row], keys: Sequence[str], *, higher_is_better: bool, title: str | None = None
) -> Table:
    """A line for each setting: mean and standard deviation, the best mean of each column marked.

    Rounds and bytes to the target are compared only between settings all of whose runs reached it.
    """
    metrics = {line["metric"] for line in lines}
    metric = metrics.pop() if len(metrics) == 1 else None
    compared = lines if metric else []
    shown = Table(title=title, header_style="bold")
    shown.add_column("setting", overflow="fold")
    columns = {
        "runs": [str(line["runs"]) for line in lines],
        f"{metric or 'metric'}, best": _cells(lines, "best", _value, _best(compared, "best", higher_is_better)),
    }
    if any(line["reached"] for line in lines):
        sure = [line for line in lines if line["reached"] == line["runs"]]
        columns["reached"] = [f"{line['reached']}/{line['runs']}" for line in lines]
        for what, written in (("rounds", _count), ("bytes", human_bytes)):
            name = f"{what}_to_target"
            columns[f"{what} to target"] = _cells(lines, name, written, _best(sure, name, False))
    else:
        columns["last"] = _cells(lines, "last", _value, _best(compared, "last", higher_is_better))
        for way in ("up", "down"):
            columns[way] = [_mean(line[f"bytes_{way}_mean"], None, human_bytes) for line in lines]
    for head in columns:
        shown.add_column(head, justify="right")
    called = short_names(keys)
    for number, line in enumerate(lines):
        shown.add_row(_setting(line, lines, called), *(column[number] for column in columns.values()))
    return shown


def _setting(line: Row, lines: Sequence[Row], called: Mapping[str, str]) -> str:
    """The variant's name, and what is tried with it."""
    others = [other for other in lines if other["variant"] == line["variant"]]
    tried = [key for key in called if any(other[key] != line[key] for other in others)]
    parts = [line["variant"], *(f"{called[key]}={line[key]}" for key in tried if line[key] is not None)]
    return escape(" ".join(filter(None, parts)) or "as in the file")


def _best(lines: Sequence[Row], name: str, higher: bool) -> Row | None:
    there = [line for line in lines if line[f"{name}_mean"] is not None]
    if len(there) < 2:
        return None
    return (max if higher else min)(there, key=lambda line: float(line[f"{name}_mean"]))


def _cells(lines: Sequence[Row], name: str, written: Callable[[float], str], best: Row | None) -> list[str]:
    cells = [_mean(line[f"{name}_mean"], line[f"{name}_std"], written) for line in lines]
    return [f"[{_BEST}]{cell} *[/]" if line is best else cell for cell, line in zip(cells, lines, strict=True)]


def _mean(mean: float | None, deviation: float | None, shown: Callable[[float], str]) -> str:
    if mean is None:
        return ""
    return shown(mean) if deviation is None else f"{shown(mean)} ± {shown(deviation)}"


def _value(value: float) -> str:
    return f"{value:.4f}"


def _count(value: float) -> str:
    return f"{value:.3g}"


def _one_kind(values: list[object]) -> list[object]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(str(value)) for value in values]
    return values if len(kinds) < 2 else [None if value is None else str(value) for value in values]


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
