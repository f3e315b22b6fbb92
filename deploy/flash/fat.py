"""The files of a FAT partition, by mtools: no mount, no root. The partition is a file of its own."""

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_client.errors import FlashError

_SECONDS = 300.0
_CLUSTER = 64 * 1024
"""The largest unit in which a FAT file system gives space away, and a folder that has to grow."""


def tool(name: str, package: str) -> str:
    """Where a program is.

    Raises:
        FlashError: it is not installed; of which Debian package it is.
    """
    # Administrators' programs are not on everybody's PATH.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        raise FlashError(f"this needs {name}, which is not installed here: apt-get install {package}")
    return found


@dataclass(frozen=True)
class Fat:
    """A FAT file system in the file ``path``."""

    path: Path

    def names(self, folder: str = "") -> set[str]:
        """The names in a folder, as they are stored; none where there is no such folder.

        Raises:
            FlashError: this is no FAT file system, or one that is damaged.
        """
        parent, _, last = folder.rpartition("/")
        if folder and last not in self.names(parent):
            return set()
        lines = self._run("mdir", "-b", "-a", f"::{folder}").decode(errors="replace").splitlines()
        return {line.removeprefix("::").rstrip("/").rpartition("/")[2] for line in lines if line.startswith("::")}

    @property
    def free(self) -> int:
        """Bytes that further files may take."""
        said = self._run("mdir", "-a", "::").decode(errors="replace")
        found = re.search(r"([\d ]+) bytes free", said)
        if found is None:
            raise FlashError(f"the boot partition does not say how full it is ({said[-80:]!r}); image damaged?")
        return int(found[1].replace(" ", ""))

    def read(self, name: str) -> bytes | None:
        """What a file holds; None where there is no such file."""
        folder, _, last = name.rpartition("/")
        return self._run("mtype", f"::{name}") if last in self.names(folder) else None

    def write(self, files: Mapping[str, bytes | Path]) -> None:
        """Write files by their paths, in this order; folders are made, what is there is replaced. They are read back.

        Raises:
            FlashError: there is no room for them, or the file system is damaged.
        """
        there = self._everything()
        if replaced := [f"::{name}" for name in files if name in there]:
            self._run("mdel", *replaced)
        free = self.free
        for name, content in files.items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            free -= size + _CLUSTER
            if free < 0:
                raise FlashError(
                    f"the boot partition is full: no room for {name} ({size >> 10} KiB); take a fresh image"
                )
        for folder, group in itertools.groupby(files, key=lambda name: name.rpartition("/")[0]):
            parts = folder.split("/") if folder else []
            for made in ("/".join(parts[: depth + 1]) for depth in range(len(parts))):
                if made not in there:
                    self._run("mmd", "-D", "s", f"::{made}")
                    there.add(made)
            self._copy(folder, {name.rpartition("/")[2]: files[name] for name in group})

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it, where there is one."""
        folder, _, last = name.rpartition("/")
        if last in self.names(folder):
            self._run("mdeltree", f"::{name}")

    def _everything(self) -> set[str]:
        # mdir takes an empty file system for one that lacks its root folder.
        if not self.names():
            return set()
        lines = self._run("mdir", "-b", "-a", "-/", "::").decode(errors="replace").splitlines()
        return {line.removeprefix("::").strip("/") for line in lines if line.startswith("::")}

    def _copy(self, folder: str, files: Mapping[str, bytes | Path]) -> None:
        """Copy files into one folder, and back to compare them: two programs started, however many they are."""
        with tempfile.TemporaryDirectory() as name:
            place, back = Path(name, "in"), Path(name, "out")
            place.mkdir()
            back.mkdir()
            for file, content in files.items():
                if isinstance(content, Path):
                    (place / file).symlink_to(content.absolute())
                else:
                    (place / file).write_bytes(content)
            target = f"::{folder}/" if folder else "::"
            self._run("mcopy", "-D", "o", *(str(place / file) for file in files), target)
            self._run("mcopy", *(f"{target}{file}" for file in files), str(back))
            for file in files:
                if not (back / file).exists() or (back / file).read_bytes() != (place / file).read_bytes():
                    raise FlashError(f"{file} reads otherwise than it was written: the boot partition is damaged")

    def _run(self, name: str, *arguments: str) -> bytes:
        command = [tool(name, "mtools"), "-i", str(self.path), *arguments]
        environment = {"LC_ALL": "C.UTF-8", "MTOOLSRC": "/dev/null", "PATH": "/usr/bin:/bin"}
        try:
            done = subprocess.run(  # noqa: S603
                command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise FlashError(f"{name} did not end within {_SECONDS:.0f} s; is the card's reader stuck?") from error
        said = " ".join(done.stderr.decode(errors="replace").split())
        if done.returncode != 0:
            raise FlashError(f"the boot partition cannot be used ({said}); expected FAT, as on Raspberry Pi OS")
        return done.stdout
