"""The client in the system: a release of its own below /opt/fedge, and the units that run it."""

import configparser
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from deploy.image.layer import Layer
from deploy.image.packages import PYTHON
from edge_client.errors import ConfigError

HOME = "opt/fedge"
_PLACES = {
    "sysusers.d": "usr/lib/sysusers.d",
    "tmpfiles.d": "usr/lib/tmpfiles.d",
    "journald.conf.d": "usr/lib/systemd/journald.conf.d",
}
_UNITS = "usr/lib/systemd/system"
_SCRIPTS = "usr/local/lib/fedge"
_ELSEWHERE = {"fedge-server.service"}
"""Units that are for the server's machine."""
_LAUNCHER = """\
#!/{folder}/bin/python
import sys

from edge_client.cli import main

sys.exit(main())
"""


def version(wheels: Sequence[Path]) -> str:
    """The version of the client among these wheels.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [wheel.name.split("-")[1] for wheel in wheels if wheel.name.startswith("fedge-")]
    if len(found) != 1:
        raise ConfigError(f"{len(found)} wheels of fedge among {len(wheels)} files; expected one, and what it needs")
    return found[0]


def release(layer: Layer, wheels: Sequence[Path], scratch: Path) -> None:
    """Add a release of the client and make it the current one: what `python3 -m venv` and pip would do on the device.

    Raises:
        ConfigError: a wheel is not for the system's processor and Python, or something that one needs is missing.
    """
    folder = f"{HOME}/releases/{version(wheels)}"
    library = f"{folder}/lib/python{PYTHON[0]}.{PYTHON[1]}/site-packages"
    packages = scratch / "packages"
    _unpack(wheels, packages)
    _compile(packages, f"/{library}")
    # pip writes launchers for the Python that it runs on.
    shutil.rmtree(packages / "bin", ignore_errors=True)
    layer.tree(library, packages)
    settings = f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {PYTHON[0]}.{PYTHON[1]}\n"
    layer.file(f"{folder}/pyvenv.cfg", settings.encode())
    layer.link(f"{folder}/bin/python3", "/usr/bin/python3")
    layer.link(f"{folder}/bin/python", "python3")
    layer.file(f"{folder}/bin/fedge", _LAUNCHER.format(folder=folder).encode())
    # As the first boot marks a release that it has installed in full.
    layer.file(f"{folder}/.whole", b"")
    layer.link(f"{HOME}/current", f"releases/{version(wheels)}")


def service(layer: Layer) -> None:
    """Add the files of `deploy` that a device has, and switch its units on as they ask for."""
    with as_file(files("deploy")) as shipped:
        for name, place in _PLACES.items():
            layer.tree(place, shipped / name)
        for script in sorted((shipped / "firstboot").glob("[a-z]*.py")):
            layer.file(f"{_SCRIPTS}/{script.name}", script.read_bytes())
        for unit in sorted((shipped / "systemd").iterdir()):
            if unit.name in _ELSEWHERE or unit.suffix not in (".service", ".path", ".timer"):
                continue
            layer.file(f"{_UNITS}/{unit.name}", unit.read_bytes())
            for target in _wanted_by(unit):
                layer.link(f"etc/systemd/system/{target}.wants/{unit.name}", f"/{_UNITS}/{unit.name}")


def _wanted_by(unit: Path) -> list[str]:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#", ";"))
    parser.read_string(unit.read_text(encoding="utf-8"))
    return parser.get("Install", "WantedBy", fallback="").split()


def _unpack(wheels: Sequence[Path], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(folder), "--implementation", "cp"]
    command += ["--python-version", f"{PYTHON[0]}.{PYTHON[1]}", "--only-binary", ":all:"]
    # Debian 12 has glibc 2.36.
    for glibc in (*range(36, 16, -1), 17):
        command += ["--platform", f"manylinux_2_{glibc}_aarch64"]
    command += ["--platform", "manylinux2014_aarch64", *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        reason = (done.stderr.strip() or "pip named no reason").splitlines()[-1]
        raise ConfigError(f"the client's wheels cannot be unpacked: {reason}; expected wheels for aarch64, Python 3.11")


def _compile(packages: Path, place: str) -> None:
    """Byte code: the client's unit writes none, and each start without it would take the longer."""
    name = f"python{PYTHON[0]}.{PYTHON[1]}"
    python = sys.executable if sys.version_info[:2] == PYTHON else shutil.which(name)
    if python is None:
        raise ConfigError(f"the client's byte code is written by {name}, which is not here: install it")
    command = [python, "-m", "compileall", "-q", "-s", str(packages), "-p", place]
    # Tests of other people's packages have files that are no Python; the files' times are not kept.
    subprocess.run([*command, "--invalidation-mode", "unchecked-hash", str(packages)], capture_output=True, check=False)  # noqa: S603
