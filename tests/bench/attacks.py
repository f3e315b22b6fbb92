"""Every attack that was thought of, carried out on real brokers and a real server: ``make bench-attacks``.

Writes build/bench/attacks.json: ``attacks`` is a list of ``attack, refused, where, evidence``. The exit status is
1 where one was not refused that is not ``KNOWN``.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federations import BUILD, ROOT, machine, write_json

sys.path.insert(0, str(ROOT))

from broker_server.broker import find_mosquitto
from tests.attacks import enrolment, floods, gate, speech
from tests.attacks.outcome import Outcome
from tests.brokers import secured
from tests.federation import Serving, federation
from tests.nats import PROGRAM as NATS

KNOWN = {("a message of 300 MB", "broker: nats")}
"""What gets through and is not ours to mend: NATS 2.9.10 reads a message whole before it looks at its limit, and drops
it then. Where devices are not to be trusted with the broker's memory, mosquitto is the broker."""


def quick(folder: Path) -> Iterator[Outcome]:
    """Attacks that take seconds."""
    yield from gate.quick("mosquitto", folder / "mosquitto")
    with speech.scene(folder / "speech") as scene:
        yield speech.replayed_update(scene)
        yield speech.in_another_name(scene)


def slow(folder: Path, measured: dict[str, Any]) -> Iterator[Outcome]:
    """The others; what was measured of a flood is added to ``measured``."""
    kinds = ("mosquitto",) if NATS is None else ("mosquitto", "nats")
    if NATS is not None:
        yield from gate.quick("nats", folder / "nats")
    for kind in kinds:
        with secured(kind, folder / f"{kind}-300", ("pi-7", "pi-8")) as broker:
            yield gate.of_300_mb(broker)
    (folder / "enrolment").mkdir()
    with federation(folder / "enrolment") as (authority, url), Serving(folder / "enrolment") as server:
        yield enrolment.used_twice(authority, url, folder / "enrolment")
        yield enrolment.expired(authority, url, folder / "enrolment")
        yield from enrolment.malformed(authority, url, folder / "enrolment", server)
    with speech.scene(folder / "tampering") as scene:
        yield speech.tampered_chunk(scene)
        yield from speech.offers(scene)
    (folder / "loris").mkdir()
    yield floods.slow_loris(folder / "loris")
    (folder / "flood").mkdir()
    outcome, measured["flood"] = floods.ten_thousand_a_second(folder / "flood")
    yield outcome


def main() -> int:
    """Attack, and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("-o", "--output", type=Path, default=BUILD / "bench" / "attacks.json")
    given = parser.parse_args()
    if find_mosquitto() is None:
        print("attacks.py needs the Debian package mosquitto: apt install mosquitto", file=sys.stderr)
        return 2
    found: list[Outcome] = []
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="attacks-") as place:
        folder = Path(place)
        for outcome in (one for part in _parts(folder, measured, quick_only=given.quick) for one in part):
            found.append(outcome)
            verdict = "refused" if outcome.refused else "GOT THROUGH"
            print(f"{verdict}: {outcome.attack} ({outcome.where}): {outcome.evidence}", flush=True)
            result = {"attacks": [one.shown() for one in found], "measured": measured, "machine": machine()}
            write_json(given.output, result)
    return 0 if all(one.refused or (one.attack, one.where) in KNOWN for one in found) else 1


def _parts(folder: Path, measured: dict[str, Any], *, quick_only: bool) -> Iterator[Iterator[Outcome]]:
    yield quick(folder)
    if not quick_only:
        yield slow(folder, measured)


if __name__ == "__main__":
    raise SystemExit(main())
