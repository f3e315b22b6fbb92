"""A federation on real data, to its end, through ``fedge simulate``; accuracy and bytes go to ``build/bench``.

python tests/bench/real.py fashion-mnist|mnist-writers|shakespeare [--codec none] [--rounds N]
"""

import argparse
import sys
from typing import Any

from federations import BUILD, ROUNDS, RUNS, BenchError, data, export, machine, simulate, write_json


def run(name: str, rounds: int, codec: str, seed: int, lr: float | None) -> dict[str, Any]:
    """Run one federation with an evaluation on the test set after each round."""
    chosen = RUNS[name]
    folder = BUILD / "bench" / (name if codec == "quantized" else f"{name}-{codec}")
    _, test = data(chosen)
    bundle = export(chosen, folder.with_name(f"{folder.name}.model"))
    out = simulate(
        chosen,
        folder,
        bundle=bundle,
        settings={
            "federation": {"seed": seed},
            "codec": {"kind": codec},
            "train.hypers": {"lr": chosen.sections["train.hypers"]["lr"] if lr is None else lr},
            "evaluation": {"data": str(test), "every": 1},
            "stop": {"rounds": rounds},
        },
        timeout=120 + 60 * rounds,
    )
    curve = [row["metrics"].get("accuracy") for row in out["rounds"]]
    scores = [value for value in curve if value is not None]
    if not scores:
        raise BenchError(f"{folder} evaluated no round; see {folder / 'log.txt'}")
    return {
        "run": name,
        "codec": codec,
        "rounds": len(curve),
        "clients": chosen.clients,
        "seed": seed,
        "accuracy": scores[-1],
        "best_accuracy": max(scores),
        # Counted at the transport over the whole run: a round's own bytes are what clients had told by its end.
        "bytes_up": out["bytes_up"],
        "bytes_down": out["bytes_down"],
        # One for each phone is part of the bytes down.
        "bundle_bytes": bundle.stat().st_size,
        "seconds": sum(row["seconds"] for row in out["rounds"]),
        "peak_rss_mib": out["peak_rss_mib"],
        "accuracy_per_round": curve,
        "by_round": out["rounds"],
        "machine": machine(),
    }


def main() -> int:
    """Run one federation and print its curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=[name for name in RUNS if name != "logistic"])
    parser.add_argument("--codec", choices=["quantized", "none"], default="quantized")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="learning rate on the clients")
    arguments = parser.parse_args()
    rounds = arguments.rounds or ROUNDS or RUNS[arguments.run].rounds
    try:
        result = run(arguments.run, rounds, arguments.codec, arguments.seed, arguments.lr)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    suffix = "" if arguments.codec == "quantized" else f"-{arguments.codec}"
    path = BUILD / "bench" / f"{arguments.run}{suffix}.json"
    write_json(path, result)
    for row in result["by_round"]:
        accuracy = row["metrics"].get("accuracy")
        shown = "" if accuracy is None else f"accuracy {accuracy:.4f}"
        moved = f"{row['bytes_up']:>12,} up  {row['bytes_down']:>12,} down"
        print(f"round {row['round']:3d}  {row['seconds']:7.2f} s  {moved}  {shown}")
    print(
        f"{arguments.run}, codec {arguments.codec}, {result['rounds']} rounds: accuracy {result['accuracy']:.4f} "
        f"(best {result['best_accuracy']:.4f}), {result['bytes_up']:,} bytes up, {result['bytes_down']:,} down, "
        f"{result['seconds']:.0f} s; all of it in {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
