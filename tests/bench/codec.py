"""Bits per parameter against distortion, beside other codecs on the same updates: ``make bench-codec``.

Sources are updates of three federations at an early, a middle and a late round, three clients each, and synthetic
vectors (updates.py). Other codecs (rivals.py) have their best settings, and are read at fedge's own bits, log-linear
between their points; figures of a source are geometric means over its clients. On the Gaussian, fedge stands beside the
theory of scalar quantizers. Speed and memory are those of the first source's middle round,
measured in processes of their own (codec_cost.py).

Results go to ``build/bench/codec.json``, a table to ``codec.md`` and a plot to ``codec.svg``. Updates and what other
codecs make of them are kept in ``build/bench``, fedge's part is always measured anew.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from codec_plot import plot
from contenders import ecsq
from contenders.points import Point, at, envelope, needed, noise
from federations import BUILD, ROOT, BenchError, command, machine, write_json
from rivals import DEFAULT, NAMES, NNCODEC, Rivals
from stored import Update
from updates import ORIGINS, SYNTHETIC, collect

from edge_client.codec.update import CodecSettings, decode_update, encode_update

RESULT = BUILD / "bench" / "codec.json"
COMPARED = (NNCODEC, "eden", "qsgd", "stc")

SWEEP = tuple(
    CodecSettings(target="bits", value=bits)
    for bits in (0.03, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 2.0, 3.0, 4.0)
)
"""Rates, ascending."""

Ratios = list[float | None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound on a field of the points within a range of rates, for real updates."""

    title: str
    field: str
    low: float
    high: float
    most: float


GOALS = (
    Goal("NMSE over NNCodec's, 0.1 to 1.25 bits", "ratio_to_nncodec", 0.095, 1.3, 0.8),
    Goal("NMSE over NNCodec's, above", "ratio_to_nncodec", 1.3, math.inf, 1.0),
    Goal("NMSE over EDEN's, from 0.35 bits", "ratio_to_eden", 0.33, math.inf, 0.5),
    Goal("NMSE over QSGD's, from 0.35 bits", "ratio_to_qsgd", 0.33, math.inf, 0.5),
    Goal("NMSE over STC's", "ratio_to_stc", 0.0, math.inf, 0.9),
)
LIMITS: tuple[tuple[str, str, float, bool], ...] = (
    ("bits above the scalar quantizer's theory, Gaussian", "synthetic_gap_bits", 0.03, False),
    ("encode, million parameters a second", "encode_mparams_s", 20.0, True),
    ("decode and accumulate, million parameters a second", "decode_mparams_s", 100.0, True),
    ("extra memory of encoding, vectors", "encode_extra_memory", 3.0, False),
)


def ours(update: Update) -> list[Point]:
    """fedge's bits and distortion at each rate, decoded from the bytes; headers count."""
    found = []
    layouts = {"delta": update.layout}
    for settings in SWEEP:
        encoded = encode_update({"delta": update.vector}, layouts, {}, settings)
        decoded = decode_update(encoded.data, layouts).vectors["delta"]
        found.append((8 * len(encoded.data) / update.vector.size, noise(update.vector, decoded)))
    return found


def compare(
    source: str, paths: list[Path], rivals: Callable[[Path], dict[str, list[Point]]]
) -> tuple[list[Row], dict[str, list[Point]]]:
    """Points of one source, and curves of its first client."""
    clients: list[tuple[list[Point], dict[str, list[Point]]]] = []
    for path in paths:
        found = {name: envelope(points) for name, points in rivals(path).items()}
        clients.append((ours(Update.read(path)), found))
    rows: list[Row] = []
    for number in range(len(SWEEP)):
        here = [(points[number], found) for points, found in clients]
        row: Row = {
            "source": source,
            "codec_bits": _mean([bits for (bits, _), _ in here]),
            "nmse": _mean([nmse for (_, nmse), _ in here]),
        }
        for name in (*COMPARED, DEFAULT):
            row[f"ratio_to_{name}"] = _mean([_ratio(point, found.get(name)) for point, found in here])
        rows.append(row)
    return rows, {"fedge": clients[0][0]} | clients[0][1]


def gap(points: list[Row]) -> float | None:
    """The most bits that a Gaussian source takes beyond theory, over all rates."""
    theory = list(ecsq.gaussian())
    gaps = [(row["codec_bits"], needed(theory, row["nmse"])) for row in points if row["source"] == "gaussian"]
    return max((bits - least for bits, least in gaps if least is not None), default=None)


def cost(path: Path, settings: CodecSettings, seconds: float) -> dict[str, float]:
    """Speed and memory at one rate, on one core."""
    program = [sys.executable, str(Path(__file__).with_name("codec_cost.py")), str(path)]
    program += [msgspec.json.encode(settings).decode(), "--seconds", str(seconds)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    said = command(program, BUILD / "bench" / "codec" / "cost.txt", variables={"PYTHONPATH": str(ROOT)} | threads)
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def verdict(result: Row) -> list[tuple[str, str, str, str]]:
    """For each goal its title, the bound, the worst value and whether it is met."""
    rows = []
    for goal in GOALS:
        held = [
            (row[goal.field], row)
            for row in result["points"]
            if goal.low <= row["codec_bits"] < goal.high and row[goal.field] is not None
            if row["source"] not in SYNTHETIC
        ]
        shown = "not measured"
        if held:
            worst, row = max(held, key=lambda pair: pair[0])
            shown = f"{worst:.3f} ({row['source']}, {row['codec_bits']:.2f} bits; {len(held)} points)"
        met = _met(max(value for value, _ in held) <= goal.most if held else None)
        rows.append((goal.title, f"at most {goal.most}", shown, met))
    for title, name, bound, least in LIMITS:
        value = result.get(name)
        shown = "not measured" if value is None else f"{value:.3f}" if bound < 1 else f"{value:.1f}"
        kept = None if value is None else value >= bound if least else value <= bound
        rows.append((title, f"at {'least' if least else 'most'} {bound:g}", shown, _met(kept)))
    return rows


def table(result: Row) -> str:
    """Markdown: the goals, then all points, then speeds."""
    goals = _markdown(["goal", "bound", "worst", "met"], verdict(result))
    head = ["source", "bits", "NMSE", "to NNCodec", "NNCodec, no RDO", "to EDEN", "to QSGD", "to STC"]
    fields = [f"ratio_to_{name}" for name in (NNCODEC, DEFAULT, "eden", "qsgd", "stc")]
    points = [
        (row["source"], f"{row['codec_bits']:.3f}", _shown(row["nmse"]), *(_shown(row[field]) for field in fields))
        for row in result["points"]
    ]
    head_speeds = ["bits", "encode Mparams/s", "decode Mparams/s", "extra memory"]
    names = ("bits", "encode_mparams_s", "decode_mparams_s", "encode_extra_memory")
    speeds = [tuple(_shown(row[name]) for name in names) for row in result["speeds"]]
    failed = "".join(f"\n- {name} is missing: {reason}\n" for name, reason in result["failed"].items())
    return "\n".join([goals, _markdown(head, points), _markdown(head_speeds, speeds)]) + failed


def _markdown(head: list[str], rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _met(kept: bool | None) -> str:
    return "" if kept is None else "yes" if kept else "**no**"


def _ratio(point: Point, rival: list[Point] | None) -> float | None:
    bits, nmse = point
    other = at(rival, bits) if rival else None
    return None if other is None else nmse / other


def _mean(values: list[float] | Ratios) -> float | None:
    """Geometric; None where a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if len(known) == len(values) else None


def main() -> int:
    """Measure and report."""
    everything = [*ORIGINS, *SYNTHETIC]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=f"default: all of {', '.join(everything)}")
    parser.add_argument("--beside", default=",".join(NAMES), help=f"other codecs, of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing")
    given = parser.parse_args()
    sources, others = given.sources or everything, [name for name in given.beside.split(",") if name]
    for what, wanted, known in (("source", sources, everything), ("codec", others, NAMES)):
        if unknown := sorted(set(wanted) - set(known)):
            parser.error(f"{unknown[0]!r} is no {what}; there are {', '.join(known)}")
    rivals = Rivals(others)
    result: Row = {"machine": machine(), "points": [], "curves": {}}
    try:
        for name in sources:
            for source, paths in collect(name).items():
                rows, result["curves"][source] = compare(source, paths, rivals.points)
                result["points"] += rows
                said = ", ".join(f"{row['codec_bits']:.3f} {_shown(row['nmse'])}" for row in rows)
                print(f"{source}: {said}", flush=True)
        rounds = list(collect(sources[0]).values())
        chosen = rounds[len(rounds) // 2][0]
        result["speeds"] = [cost(chosen, settings, given.seconds) for settings in SWEEP[1::3]]
        default = cost(chosen, CodecSettings(), given.seconds)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    result |= {name: default[name] for _, name, _, _ in LIMITS if name in default} | {"default_bits": default["bits"]}
    result |= {"synthetic_gap_bits": gap(result["points"]), "failed": rivals.failed}
    write_json(RESULT, result)
    RESULT.with_suffix(".md").write_text(table(result))
    plot(result["curves"], RESULT.with_suffix(".svg"))
    print(table(result))
    print(f"all of it in {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
