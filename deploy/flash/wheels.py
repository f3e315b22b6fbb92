"""The client's wheels for a Raspberry Pi: of fedge and pip from what is installed here, of the rest from pip's index.

A wheel is a zip file with a list of checksums (https://packaging.python.org/specifications/binary-distribution-format/).
"""

import base64
import csv
import email
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edge_client.errors import FlashError

SUMS = "SHA256SUMS"
_ROOMS = ("edge_client", "broker_server", "export", "deploy")
_GLIBC = range(36, 16, -1)
"""Minor versions of the C library whose wheels run on Bookworm, which has 2.36, and later; the newest first."""
_SECONDS = 1800.0
_OF_AN_INSTALLATION = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})
"""Files beside a distribution's metadata that installing it has made."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def collect(python: str, cache: Path, constraints: Path | None = None) -> Mapping[str, Path]:
    """The wheels with which ``pip install fedge`` needs no network on aarch64 with that Python, by name.

    ``SHA256SUMS`` is one of the files. What was fetched is kept in ``cache`` for as long as it is whole and asked for.

    Raises:
        FlashError: pip is not installed or fails, or its index lacks a wheel.
    """
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    own = repack("fedge", folder)
    pinned = b"" if constraints is None else constraints.read_bytes()
    wanted = "\n".join([python, *sorted(distribution("fedge").requires or ())]).encode() + pinned
    others = folder / f"cp{python.replace('.', '')}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if not _whole(others):
        shutil.rmtree(others, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            _download(Path(name), own, python, constraints)
            os.rename(name, others)
            Path(name).mkdir()
    files = {path.name: path for path in (own, *sorted(others.glob("*.whl")))}
    sums = folder / f"{SUMS}-{python}"
    sums.write_text("".join(f"{_digest(path)}  {name}\n" for name, path in files.items()))
    return files | {SUMS: sums}


def repack(name: str, folder: Path) -> Path:
    """A wheel of a distribution that is installed here, be it from a wheel or a source tree; the same each time.

    Raises:
        FlashError: it is not installed, or holds programs for this machine.
    """
    # In a source tree there may be another of the name, which says nothing of its wheel.
    installed = sorted(distributions(name=name), key=lambda one: not one.read_text("WHEEL"))
    if not installed:
        raise FlashError(f"{name} is not installed here as a package; pip install {name}")
    found = installed[0]
    if "Root-Is-Purelib: true" not in (found.read_text("WHEEL") or ""):
        raise FlashError(f"{name} is not installed here from a wheel that any machine can use")
    info = f"{name}-{found.version}.dist-info"
    contents = dict(_contents(found))
    for entry in sorted(found.files or (), key=str):
        inner = str(entry).partition(".dist-info/")[2]
        if inner and inner not in _OF_AN_INSTALLATION:
            contents[f"{info}/{inner}"] = entry.read_binary()
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow((path, f"sha256={digest}", len(data)))
    rows.writerow((f"{info}/RECORD", "", ""))
    contents[f"{info}/RECORD"] = record.getvalue().encode()
    target = folder / f"{name}-{found.version}-py3-none-any.whl"
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in contents.items():
                archive.writestr(zipfile.ZipInfo(path, _EPOCH), data, zipfile.ZIP_DEFLATED)
        file.flush()
        shutil.copyfile(file.name, target)
    return target


def _contents(found: Distribution) -> Iterator[tuple[str, bytes]]:
    """A distribution's modules and data by their paths in a wheel."""
    recorded = [
        path for path in found.files or () if ".dist-info/" not in str(path) and not str(path).startswith(("..", "__"))
    ]
    roots = {path.parts[0] for path in recorded}
    if found.name == "fedge" and not set(_ROOMS[:1]) <= roots:
        # Installed from its source tree, of which the record has nothing.
        for room in _ROOMS:
            spec = importlib.util.find_spec(room)
            for place in (spec.submodule_search_locations or ()) if spec is not None else ():
                root = Path(place)
                for path in sorted(root.rglob("*")):
                    if path.is_file() and "__pycache__" not in path.parts:
                        yield f"{room}/{path.relative_to(root).as_posix()}", path.read_bytes()
        return
    for entry in sorted(recorded, key=str):
        if entry.suffix != ".pyc":
            yield entry.as_posix(), entry.read_binary()


def _download(folder: Path, own: Path, python: str, constraints: Path | None) -> None:
    """Fetch what fedge needs on the other machine, whatever this one is."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for minor in _GLIBC:
        target += ["--platform", f"manylinux_2_{minor}_aarch64"]
    target += ["--platform", "manylinux2014_aarch64", "--dest", str(folder)]
    target += [] if constraints is None else ["--constraint", str(constraints)]
    asked = {str(own)}
    while asked:
        _pip("download", *target, *sorted(asked))
        (folder / own.name).unlink(missing_ok=True)
        # pip goes by this machine's Python where a requirement is for some alone.
        lacking = missing([own, *folder.glob("*.whl")], python)
        if lacking <= asked:
            break
        asked = lacking
    if lacking:
        raise FlashError(f"the wheels for aarch64 with Python {python} lack {', '.join(sorted(lacking))}")
    # The card's system may have none, and it is the one thing that cannot be installed with itself.
    repack("pip", folder)
    sums = "".join(f"{_digest(path)}  {path.name}\n" for path in sorted(folder.glob("*.whl")))
    (folder / SUMS).write_text(sums)


def missing(wheels: Iterable[Path], python: str) -> set[str]:
    """What wheels require on aarch64 Linux with a version of Python, and none of them is (PEP 508)."""
    there, wanted = {}, []
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            about = email.message_from_bytes(archive.read(info))
        there[canonicalize_name(about["Name"])] = about["Version"]
        wanted += [Requirement(line) for line in about.get_all("Requires-Dist", [])]
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "aarch64"}
    machine |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}
    machine |= {"platform_python_implementation": "CPython", "implementation_name": "cpython"}
    return {
        f"{one.name}{one.specifier}"
        for one in wanted
        if one.marker is None or one.marker.evaluate(machine)
        if not one.specifier.contains(there.get(canonicalize_name(one.name), "0.dev0"), prereleases=True)
        or canonicalize_name(one.name) not in there
    }


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FlashError(f"pip {arguments[0]} did not end within {_SECONDS:.0f} s; is its index reachable?") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FlashError(f"pip {arguments[0]} failed: {said[-1] if said else 'it says nothing'}")


def _whole(folder: Path) -> bool:
    """Whether a folder has all that its list names, unchanged."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        return bool(lines) and all(_digest(folder / line[66:]) == line[:64] for line in lines)
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
