"""A new client that cannot live, on an emulated Pi: it ends again and again, and the one before comes back."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from tests.pi.card import put_in_root
from tests.pi.run import Pi
from tests.pi.scene import BATCH, DEVICE, ROOT, SAMPLES, Scene

BROKEN = "0.1.1"
_DIES = b"""

def _dies(self: object) -> None:
    raise SystemExit(3)


Device.run = _dies  # type: ignore[method-assign]
"""
_CONSOLE = "[Service]\nStandardOutput=journal+console\nStandardError=journal+console\n"


def broken_update(
    board: str,
    image: Path,
    bundle: Path,
    folder: Path,
    wheels: Mapping[str, Path],
    *,
    log: Callable[[str], None] = print,
) -> str:
    """What the device says when it has gone back; after that, the old client has trained once more."""
    with closing(Scene(folder / "host", bundle, 1_000, SAMPLES // BATCH, chunk=65_536)) as scene:
        pi = Pi(board, image, folder / "pi", scene.relay.port)
        pi.fill(scene.card(), scene.folder / "digits.npz")
        console = folder / "console.conf"
        console.write_text(_CONSOLE)
        put_in_root(pi.card, {"/etc/systemd/system/fedge-update.service.d/test.conf": console})
        with pi.power() as machine:
            machine.until('"recorded": true')
            release = _release(folder / "release", wheels)
            told = _fleet(scene, "update", release, "--waves", "1")
            log(told)
            log(machine.until("release 0.1.1: on trial", "is not installed")[1])
            said = machine.until("release 0.1.1: back to", "has heard the server, and stays")[1]
            log(said)
            machine.until('"recorded": true')
            log(f"{DEVICE} trains again")
            log(_fleet(scene))
            return said


def _fleet(scene: Scene, *arguments: object) -> str:
    command = [sys.executable, "-c", "from broker_server.fleet_cli import fleet; fleet()"]
    command += [str(scene.folder / "federation.toml"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout + done.stderr


def _release(folder: Path, wheels: Mapping[str, Path]) -> Path:
    """The wheels of a client that can be loaded, and that ends when it is to run."""
    folder.mkdir()
    for name, path in wheels.items():
        if name.endswith(".whl") and not name.startswith("fedge-"):
            shutil.copy(path, folder)
    (ours,) = (path for name, path in wheels.items() if name.startswith("fedge-"))
    version = ours.name.split("-")[1]
    with (
        zipfile.ZipFile(ours) as old,
        zipfile.ZipFile(folder / f"fedge-{BROKEN}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            if name == "edge_client/device.py":
                data += _DIES
            if name.endswith(".dist-info/METADATA"):
                data = re.sub(rb"^Version: .*$", f"Version: {BROKEN}".encode(), data, count=1, flags=re.MULTILINE)
            place = name.replace(f"fedge-{version}.dist-info", f"fedge-{BROKEN}.dist-info")
            if name.endswith(".dist-info/RECORD"):
                data = re.sub(rb",sha256=[^,]*,\d*", b",,", data).replace(
                    f"fedge-{version}.dist-info".encode(), f"fedge-{BROKEN}.dist-info".encode()
                )
            new.writestr(place, data)
    return folder
