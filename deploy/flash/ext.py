"""Looks into an ext4 file system inside an image, by debugfs: no mount, no root, nothing is written."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deploy.flash.fat import tool
from edge_client.errors import FlashError

_SECONDS = 60.0


@dataclass(frozen=True)
class Ext:
    """An ext2, ext3 or ext4 file system that begins at byte ``start`` of ``disk``."""

    disk: Path
    start: int

    def exists(self, path: str) -> bool:
        """Whether there is something at a path; links to folders on the way are followed."""
        return self._stat(path) is not None

    def link(self, path: str) -> str | None:
        """Where a symbolic link points; None where there is none."""
        found = re.search(r'^Fast link dest: "(.*)"$', self._stat(path) or "", re.MULTILINE)
        return None if found is None else found[1]

    def read(self, path: str, most: int = 65536) -> bytes | None:
        """The first bytes of a file; None where there is none."""
        if "Type: regular" not in (self._stat(path) or ""):
            return None
        process = subprocess.Popen(  # noqa: S603
            self._command(f"cat {path}"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        with process:
            assert process.stdout is not None
            data = process.stdout.read(most)
            process.kill()
        return data

    def _stat(self, path: str) -> str | None:
        done = subprocess.run(  # noqa: S603
            self._command(f"stat {path}"),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
        if "Inode:" in done.stdout:
            return done.stdout
        if "File not found" in done.stdout + done.stderr:
            return None
        said = " ".join(line for line in done.stderr.split("\n") if not line.startswith("debugfs "))
        raise FlashError(f"the root partition cannot be read ({said.strip()[:200]}); expected ext4; image damaged?")

    def _command(self, request: str) -> list[str]:
        # What it is asked for are paths from this program's text, never from an image.
        return [tool("debugfs", "e2fsprogs"), "-R", request, f"{self.disk}?offset={self.start}"]
