"""Brokers' programs on this machine: where they are, and how one that runs is told to read its files again."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

# Debian keeps them in /usr/sbin, which is not on an ordinary user's PATH.
PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")


def find(name: str) -> Path | None:
    """Where a broker is installed: on PATH, or in the places where Debian, Homebrew and source builds put it."""
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(PLACES))
    return None if found is None else Path(found)


def hang_up(pid_file: Path, configuration: Path) -> bool:
    """Send SIGHUP to the process named in a file, if it runs with that configuration; whether it does."""
    try:
        pid = int(pid_file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    # Numbers come again: it may be anybody's process by now.
    if pid <= 1 or str(configuration) not in _command(pid):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGHUP)
        return True
    return False


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    with contextlib.suppress(OSError):
        command = ["ps", "-o", "args=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return ""
