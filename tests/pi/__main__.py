"""`make test-pi`: builds the image, boots it on emulated boards, and writes what was measured to build/bench/pi.json.

The image, and the system that it is made of, are kept in ``--cache`` and used again while nothing that goes into them
has changed. Emulation is slow: a whole run takes half an hour on two cores, ``--quick`` a few minutes.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.flash import wheels
from deploy.image.build import build
from deploy.image.packages import PYTHON
from tests.pi.machine import BOARDS, missing
from tests.pi.run import Measured, carry_out, wrong_claim
from tests.pi.scene import export_digits
from tests.pi.suite import CHOSEN, run_suite
from tests.pi.update import broken_update

MOST_MIB = 120.0
"""Resident memory that the client may have while it trains the digits CNN."""


def prepared(cache: Path) -> tuple[Path, Path, Mapping[str, Path]]:
    """The image, with this tree's client in it, the digits' bundle, and the client's wheels."""
    cache.mkdir(parents=True, exist_ok=True)
    client = wheels.collect(f"{PYTHON[0]}.{PYTHON[1]}", cache)
    image = build(list(client.values()), cache=cache / "image", log=_say)
    bundle = cache / "digits.fedge"
    if not bundle.exists():
        export_digits(bundle)
    return image, bundle, client


def main() -> int:
    """Run, and say what came of it; 1 where something is lost, doubled, wrong or too large."""
    parser = argparse.ArgumentParser(prog="python -m tests.pi", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--board", action="append", choices=list(BOARDS), help="these boards alone")
    parser.add_argument("--cuts", type=int, default=2, help="power cuts for each board: in training, in an upload ...")
    parser.add_argument("--steps", type=int, default=100, help="training steps of a round")
    parser.add_argument("--quick", action="store_true", help="virt alone, one power cut, no wrong claim")
    parser.add_argument("--suite", nargs="*", metavar="FILE", help="the device's tests instead: these, or a choice")
    parser.add_argument("--cache", type=Path, default=Path("build/pi"))
    parser.add_argument("--keep", type=Path, default=None, help="leave cards, consoles and ledgers in this folder")
    parser.add_argument("--output", type=Path, default=Path("build/bench/pi.json"))
    told = parser.parse_args()
    if lacking := missing():
        print(f"not found: {lacking}; install qemu-system-arm, mtools and e2fsprogs", file=sys.stderr)
        return 2
    image, bundle, client = prepared(told.cache)
    with tempfile.TemporaryDirectory(dir=told.cache) as scratch:
        folder = told.keep or Path(scratch)
        if told.suite is not None:
            found: dict[str, Any] = {"suite": run_suite(image, folder / "suite", told.suite or CHOSEN, _say)}
            sound = all(" failed" not in line and " error" not in line for line in found["suite"].values())
        else:
            boards = ["virt"] if told.quick else told.board or list(BOARDS)
            cuts = 1 if told.quick else told.cuts
            runs = [
                carry_out(board, image, bundle, folder / board, cuts=cuts, steps=told.steps, log=_say)
                for board in boards
            ]
            found = summed(runs, image)
            # What comes next may fail, and this took long.
            _write(told.output, found)
            if not told.quick:
                found["wrong_claim"] = wrong_claim("virt", image, bundle, folder / "wrong-claim")
                _say(found["wrong_claim"])
                update = folder / "broken-update"
                found["broken_update"] = broken_update("virt", image, bundle, update, client, log=_say)
            sound = _sound(found)
    _write(told.output, found)
    _say(f"{told.output}: {'all adds up' if sound else 'SOMETHING IS WRONG'}")
    return 0 if sound else 1


def summed(runs: Sequence[Measured], image: Path) -> dict[str, Any]:
    """What is reported of these runs."""
    return {
        "image_mib": round(image.stat().st_size / 2**20, 1),
        "image_used_mib": round(image.stat().st_blocks * 512 / 2**20, 1),
        # The slowest board's; each is below.
        "boot_seconds": round(max(run.boot_seconds for run in runs), 1),
        "client_rss_mib": max(run.client_rss_mib for run in runs),
        "updates_accepted": sum(run.updates_accepted for run in runs),
        "lost": sum(run.lost for run in runs),
        "doubled": sum(run.doubled for run in runs),
        "power_cuts": sum(run.cuts for run in runs),
        "runs": [asdict(run) for run in runs],
        "host": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def _sound(found: dict[str, Any]) -> bool:
    right = not found["lost"] and not found["doubled"] and not any(run["wrong"] for run in found["runs"])
    refused = "NOT ENROLLED" in found.get("wrong_claim", "NOT ENROLLED")
    returned = "back to" in found.get("broken_update", "back to")
    return right and refused and returned and 0 < found["client_rss_mib"] <= MOST_MIB


def _write(output: Path, found: dict[str, Any]) -> None:
    """What other runs have measured stays."""
    output.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(output.read_text()) if output.exists() else {}
    output.write_text(json.dumps(before | found, indent=2) + "\n")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
