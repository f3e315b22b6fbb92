"""Files as a card is to have them, in a tar whose bytes depend on nothing but them."""

import hashlib
import io
import tarfile
from pathlib import Path


class Layer:
    """Files, links and folders of root; the folders that lead to them come by themselves."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[tarfile.TarInfo, bytes]] = {}

    def file(self, path: str, data: bytes, mode: int | None = None) -> None:
        """A file; unless told, a script is executable and all else is readable."""
        info = tarfile.TarInfo(path)
        info.mode = (0o755 if data[:2] == b"#!" or data[:4] == b"\x7fELF" else 0o644) if mode is None else mode
        info.size = len(data)
        self._add(info, data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        info = tarfile.TarInfo(path)
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
        self._add(info)

    def folder(self, path: str, mode: int = 0o755) -> None:
        """A folder; one that is there already stays."""
        if path not in self._members:
            info = tarfile.TarInfo(path)
            info.type, info.mode = tarfile.DIRTYPE, mode
            self._add(info)

    def tree(self, path: str, source: Path) -> None:
        """All that is in a folder, below ``path``."""
        for found in sorted(source.rglob("*")):
            place = "/".join(filter(None, (path, found.relative_to(source).as_posix())))
            if found.is_symlink():
                self.link(place, str(found.readlink()))
            elif found.is_file():
                self.file(place, found.read_bytes())
            elif not any(found.iterdir()):
                self.folder(place)

    def pack(self) -> bytes:
        """The tar."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for path in sorted(self._members):
                info, data = self._members[path]
                tar.addfile(info, io.BytesIO(data))
        return packed.getvalue()

    def digest(self) -> str:
        """What tells this layer from others."""
        return hashlib.sha256(self.pack()).hexdigest()

    def _add(self, info: tarfile.TarInfo, data: bytes = b"") -> None:
        parent = info.name.rpartition("/")[0]
        if parent:
            self.folder(parent)
        # Later than any system's packages, and the same every time.
        info.mtime = 1_700_000_000
        self._members[info.name] = info, data
