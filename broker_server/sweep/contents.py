"""What a setting's file holds, as a digest: a run is the same only where its bundle, data and own algorithm are."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from edge_client.errors import ConfigError


class Contents:
    """Digests of files, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, or of all files of a folder and their names.

        Raises:
            ConfigError: it cannot be read.
        """
        if path not in self._known:
            try:
                self._known[path] = _folder(path) if path.is_dir() else _file(path)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a file that is there") from error
        return self._known[path]

    def of(self, spec: str) -> str:
        """What ``spec`` names, a path or ``module:attribute``: of a module its name and source. Empty for empty.

        Raises:
            ConfigError: there is no such file.
        """
        module, colon, _ = spec.partition(":")
        if not spec or not colon or Path(spec).exists():
            return spec and self.digest(Path(spec))
        source = _source(module)
        return spec if source is None else f"{spec} {self.digest(source)}"


def _file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(path: Path) -> str:
    names = sorted(entry.relative_to(path) for entry in path.rglob("*") if entry.is_file())
    lines = [f"{name.as_posix()} {_file(path / name)}" for name in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _source(module: str) -> Path | None:
    """A module's file, found as `fedge simulate` finds it; None where it has none."""
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    finally:
        sys.path.remove(os.getcwd())
    return Path(found.origin) if found is not None and found.has_location and found.origin else None
