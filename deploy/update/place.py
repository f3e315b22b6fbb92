"""Puts the updater on a device: ``python -m deploy.update.place CLAIM``, as root, at the first start.

What is copied is no part of any release from then on: the updater has to work when the client does not.
"""

import argparse
import json
import shutil
from pathlib import Path

from deploy.update import __file__ as _package
from deploy.update.updater import write

PARTS = ("__init__.py", "machine.py", "updater.py")
_MAIN = "from deploy.update.updater import main\n\nmain()\n"


def place(base: Path) -> None:
    """Copy the updater below ``base``, as ``python3 -I BASE/update`` runs it; what is there already stays."""
    program = base / "update"
    if (program / "__main__.py").exists():
        return
    source, target = Path(_package).parent, program / "deploy" / "update"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.parent / "__init__.py", target.parent / "__init__.py")
    for part in PARTS:
        shutil.copyfile(source / part, target / part)
    # Last: a copy that a power cut ended is made anew.
    write(program / "__main__.py", _MAIN)


def trust(base: Path, claim: Path) -> None:
    """Write down whose signature is believed on this device, from its claim; what is there already stays.

    The claim is the one that came with the card: who could change it could have put another client there.
    """
    if not (base / "trust.json").exists():
        said = json.loads(claim.read_text(encoding="utf-8"))
        write(base / "trust.json", json.dumps({"federation": said["federation"], "pins": said["pins"]}))


def main() -> None:
    """Put it there, and believe a claim's federation where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("claim", type=Path, nargs="?", help="believe the federation of this claim")
    parser.add_argument("--base", type=Path, default=Path("/opt/fedge"), help="where clients are installed")
    said = parser.parse_args()
    said.base.mkdir(parents=True, exist_ok=True)
    place(said.base)
    if said.claim is not None:
        trust(said.base, said.claim)


if __name__ == "__main__":
    main()
