"""What runs came to, in figures: a line for each run, and over the seeds of each setting mean and deviation."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from broker_server.config import Stop
from broker_server.sweep.runs import Planned

Row = dict[str, Any]
"""By column; None where there is no value."""
_NAMED = ("name", "variant", "seed")
TO_TARGET = ("rounds_to_target", "bytes_to_target", "seconds_to_target")


def swept(planned: Iterable[Planned]) -> tuple[str, ...]:
    """The dotted keys that runs set, in the order in which they come first."""
    return tuple(dict.fromkeys(key for one in planned for key in one.run.settings))


def rows(planned: Sequence[Planned], results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A line for each run that has a result, all with the same columns.

    Name, variant, seed; each setting that some run sets, with what it is in this one; and the `figures`.
    """
    keys = swept(planned)
    found = []
    for one in planned:
        if (result := results.get(one.run.name)) is None:
            continue
        run = one.run
        tree = msgspec.to_builtins(one.federation)
        settings = {key: _plain(run.settings[key] if key in run.settings else _lookup(tree, key)) for key in keys}
        found.append(
            {"name": run.name, "variant": run.variant, "seed": run.seed}
            | settings
            | figures(result, one.federation.stop)
        )
    columns = dict.fromkeys(column for row in found for column in row)
    return [{column: row.get(column) for column in columns} for row in found]


def figures(result: Mapping[str, Any], stop: Stop) -> Row:
    """The figures of one result of ``fedge simulate --json``.

    ``rounds``, ``seconds``, ``bytes_up`` and ``bytes_down`` are of the whole run, bytes as the phones counted them.
    ``metric`` is ``stop.metric``; ``last`` and ``best`` are its values. ``..._to_target`` are sums over the rounds
    until ``stop.target`` was reached, None where it was not; its bytes are those up and down together. The last
    evaluated round's metrics are ``metrics.<name>``.
    """
    rounds = result["rounds"]
    values = [(number, done["metrics"].get(stop.metric)) for number, done in enumerate(rounds)]
    # A metric that was not a number is null in JSON.
    evaluated = [(number, value) for number, value in values if value is not None]
    best: float | None = None
    for _, value in evaluated:
        best = value if stop.better(value, best) else best
    reached = next((number + 1 for number, value in evaluated if stop.reached(value)), None)
    until = rounds[:reached] if reached else None
    last = rounds[evaluated[-1][0]]["metrics"] if evaluated else rounds[-1]["metrics"] if rounds else {}
    return {
        "rounds": len(rounds),
        "seconds": result["seconds"],
        "bytes_up": result["bytes_up"],
        "bytes_down": result["bytes_down"],
        "metric": stop.metric,
        "last": evaluated[-1][1] if evaluated else None,
        "best": best,
        "rounds_to_target": reached,
        "bytes_to_target": until and sum(done["bytes_up"] + done["bytes_down"] for done in until),
        "seconds_to_target": until and sum(done["seconds"] for done in until),
        **{f"metrics.{name}": value for name, value in sorted(last.items())},
    }


def summary(found: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """A line for each setting: of each figure its mean and its standard deviation over the seeds.

    ``runs`` says over how many, ``reached`` how many of them reached the target, over which alone ``..._to_target``
    are. A deviation is the sample's, None for less than two values.
    """
    groups: dict[str, list[Row]] = {}
    same = ("variant", *keys, "metric")
    for row in found:
        groups.setdefault(json.dumps([row[key] for key in same]), []).append(row)
    lines = []
    for group in groups.values():
        first = group[0]
        line: Row = {key: first[key] for key in same} | {"runs": len(group)}
        line["reached"] = sum(row["rounds_to_target"] is not None for row in group)
        for column in first:
            if column in same or column in _NAMED:
                continue
            values = [row[column] for row in group if row[column] is not None and math.isfinite(row[column])]
            line[f"{column}_mean"] = statistics.fmean(values) if values else None
            line[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    return lines


def _lookup(tree: Any, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)
