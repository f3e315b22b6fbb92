"""Takes a card's folder over in a child whose power is cut at its n-th change to the file systems, for every n.

After each cut a second child does the rest. What must hold meanwhile and in the end is printed where it does not.
Run as a program, as it forks: python cuts.py FOLDER
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from deploy.firstboot import firstboot

CHANGES = (
    "replace",
    "rename",
    "fsync",
    "unlink",
    "rmdir",
    "symlink",
    "mkdir",
    "open",
    "write",
    "sync",
    "truncate",
    "chmod",
)
CUT = 77


def cutting(limit):
    """Let the process die at its ``limit``-th change: before it, and nothing is tidied up."""
    count = 0

    def cut(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == limit:
                os._exit(CUT)
            return function(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, cut(getattr(os, name)))


def pretend(command):
    """In the place of venv and pip: what they do, in steps."""
    if command[1:3] == ["-m", "venv"]:
        os.mkdir(command[-1])
        os.mkdir(f"{command[-1]}/bin")
    elif "install" in command:
        folder = Path(command[0]).parent
        for name in ("python", "fedge"):
            os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY))


def state(root):
    """All files below a folder, as one digest."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() + oct(path.stat().st_mode)
    return found


def broken(root, secrets):
    """What must never be so: a secret is nowhere, or a release is current that is not whole."""
    for name, target, data in secrets:
        places = [root / "boot/firmware/fedge" / name, root / target]
        if not any(place.exists() and place.read_bytes() == data for place in places):
            yield f"{name} is lost"
        if (root / target).exists() and (root / target).read_bytes() != data:
            yield f"{target} is torn"
    current = root / "opt/fedge/current"
    if current.is_symlink() and not ((current / ".whole").exists() and (current / "bin/fedge").exists()):
        yield "a release is current that is not whole"


def attempt(root, limit):
    """Run in a child; whether its power was cut."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        places = firstboot.Places(root, root / "boot/firmware/fedge")
        # A process that dies loses nothing that the kernel has: to wait for the disk would prove nothing.
        os.fsync = os.sync = lambda *_: None
        if limit:
            cutting(limit)
        try:
            firstboot.take_over(places, pretend)
        except BaseException:
            os._exit(1)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, CUT), f"ended with {ended} at {limit}"
    return ended == CUT


def main(folder):
    model, root, found = folder / "model", folder / "root", []
    card = model / "boot/firmware/fedge"
    secrets = [
        ("claim.fedgeclaim", "var/lib/fedge/claim.fedgeclaim", (card / "claim.fedgeclaim").read_bytes()),
        ("device.toml", "etc/fedge/device.toml", (card / "device.toml").read_bytes()),
    ]

    def fresh():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(model, root)

    fresh()
    attempt(root, 0)
    wanted = state(root)
    limit = 1
    while True:
        fresh()
        cut = attempt(root, limit)
        found += [f"at {limit}: {problem}" for problem in broken(root, secrets)]
        attempt(root, 0)
        now = state(root)
        if now != wanted:
            found.append(f"at {limit}: {sorted(set(now.items()) ^ set(wanted.items()))}")
        if not cut:
            break
        limit += 1
    print(json.dumps({"cuts": limit - 1, "wrong": found, "files": sorted(wanted)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
