"""Kill a whole federation again and again and write what came of it: ``make prove-kills``.

A real ``fedge serve``, five real ``fedge join`` and a real mosquitto; the seed is fresh unless ``--seed`` names one,
and printed with every kill. Results go to ``build/bench/kills.json``; the command fails where an update is lost or
counted twice.
"""

import argparse
import json
import secrets
import sys
import tempfile
from pathlib import Path

from tests.kills.run import carry_out

RESULT = Path(__file__).parents[2] / "build" / "bench" / "kills.json"


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20, help="of the server and of clients")
    parser.add_argument("--brokers", type=int, default=6, help="of the broker, with and without persistence")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="run in this folder, and leave it there")
    arguments = parser.parse_args()
    seed = secrets.randbits(40) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedge-kills-") as temporary:
        folder = arguments.keep or Path(temporary) / "run"
        result = carry_out(folder, seed, arguments.rounds, arguments.kills, arguments.brokers)
    account = result.account
    report = {
        "rounds": account.rounds,
        "kills": result.kills["server"] + result.kills["client"],
        "lost": len(account.lost),
        "doubled": len(account.doubled),
        "recorded": account.recorded,
        "withdrawn": account.withdrawn,
        "rejected": account.rejected,
        "apart": account.apart,
        "killed": dict(sorted(result.kills.items())),
        "seconds": result.seconds,
        "seed": seed,
        "findings": [*account.lost, *account.doubled, *account.wrong],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return int(not account.clean or account.rounds != arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())
