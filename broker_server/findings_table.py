"""What evaluations found, for people: a table of classes, one of inputs, and what is not kept."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from broker_server.findings import Findings, drift

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = 20
"""Lines of a table: of many classes those that the model knows least, of many inputs those that have changed most."""


def read_findings(rows: Sequence[bytes]) -> list[Findings]:
    """The first findings and the newest, as the ledger has them."""
    return [msgspec.json.decode(data, type=Findings) for data in rows]


def tables(found: Sequence[Findings]) -> "Iterator[Table]":
    """Tables of the newest findings; how far data has changed is since the first."""
    if not found:
        return
    first, newest = found[0], found[-1]
    if newest.classes:
        yield _classes(newest)
    if newest.features:
        yield _inputs(first, newest)


def lines(found: Sequence[Findings]) -> list[str]:
    """What a table does not tell of the newest findings."""
    if not found:
        return []
    first, newest = found[0], found[-1]
    told = ", ".join(f"{name} by {count}" for name, count in newest.clients.items())
    said = [f"round {newest.round}, version {newest.version}: told by clients: {told}"]
    for name, count in newest.clients.items():
        if count < newest.least:
            said.append(f"{name}: told by {count}; sums over fewer than analytics.least, {newest.least}, are not kept")
    if first is not newest and (moved := drift(first.labels, newest.labels)) is not None:
        said.append(f"labels have changed by {moved:.3f} since round {first.round} (0 not at all, 1 entirely)")
    return said


def _classes(found: Findings) -> "Table":
    from rich.table import Table

    shown = Table(
        "class", *["samples", "recall", "precision"] * bool(found.confusion), *["trained on"] * bool(found.labels)
    )
    rows = []
    by_class = found.by_class
    for number, name in enumerate(found.classes):
        cells = [name]
        if by_class:
            row = by_class[number]
            cells += [str(row.samples), _value(row.recall), _value(row.precision)]
        if found.labels:
            cells.append(str(found.labels[number]))
        rows.append((1.0 if not by_class or (recall := by_class[number].recall) is None else recall, number, cells))
    return _filled(shown, rows, "classes", "those with the lowest recall" if by_class else "the first")


def _inputs(first: Findings, found: Findings) -> "Table":
    from rich.table import Table

    before = {one.name: one for one in first.features if first is not found}
    head = ["input", "mean", "deviation", "below", "in range", "above"]
    shown = Table(*head, *[f"change since round {first.round}"] * bool(before))
    rows = []
    for number, one in enumerate(found.features):
        cells = [one.name, _value(one.mean), _value(one.deviation), str(one.below), str(sum(one.bins)), str(one.above)]
        old = before.get(one.name)
        same = old is not None and (old.low, old.high) == (one.low, one.high)
        moved = drift(old.shares, one.shares) if old is not None and same else None
        if before:
            cells.append("" if moved is None else f"{moved:.3f}")
        rows.append((-(moved or 0.0), number, cells))
    return _filled(shown, rows, "inputs", "those that have changed most" if before else "the first")


def _filled(shown: "Table", rows: list[tuple[float, int, list[str]]], what: str, which: str) -> "Table":
    """The table with its lines in order, and of too many only the most telling."""
    chosen = sorted(sorted(rows)[:_ROWS], key=lambda row: row[1])
    for _, _, cells in chosen:
        shown.add_row(*cells)
    if len(rows) > _ROWS:
        shown.caption = caption = f"{_ROWS} of {len(rows)} {what}, {which}"
        shown.min_width = len(caption)
    return shown


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
