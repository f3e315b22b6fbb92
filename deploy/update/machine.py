"""What the updater does to a device beside files: environments, probes, the client's service."""

import json
import os
import platform
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNIT = "fedge-client.service"
_PROBE = "import importlib.metadata as m; import edge_client.cli, edge_client.device; print(m.version('fedge'))"
"""What a client that cannot start fails at: also at instructions that the processor has not got."""


class RefusedError(Exception):
    """A release is not installed; the message says why."""


@dataclass
class Machine:
    """What the updater does to the device beside files; tests have another one."""

    patience: float = 600.0
    """Seconds that a new client has to hear the server."""
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    wall: Callable[[], float] = time.time
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    user: str = "fedge"
    """Whose rights a new client is tried with; empty is one's own."""
    judge_user: str = "nobody"
    """Whose rights a release is judged with; empty is one's own."""
    systemctl: str = "/usr/bin/systemctl"
    tag: str = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine().lower()}"

    def judge(self, current: Path, question: dict[str, Any]) -> dict[str, Any]:
        """Whether a release may be installed, as the client says that is installed (`deploy.update.admission`).

        Raises:
            RefusedError: it does not say.
        """
        command = [str(current / "bin" / "python"), "-I", "-m", "deploy.update.admission"]
        # What is read there comes from the client's user: with nobody's rights, and not with those of that user either.
        said = self.run(command, "it cannot be judged", said=json.dumps(question), user=self.judge_user)
        found: dict[str, Any] = json.loads(said)
        return found

    def build(self, folder: Path, links: Path, version: str) -> None:
        """Make an environment with the wheels in a folder.

        Raises:
            RefusedError: they do not make one.
        """
        # Raspberry Pi OS Lite may lack ensurepip: pip may come as a wheel, and runs from it.
        wheel = next(links.glob("pip-*.whl"), None)
        without = [] if wheel is None else ["--without-pip"]
        self.run([sys.executable, "-I", "-m", "venv", *without, str(folder)], "an environment cannot be made")
        pip = ["-m", "pip"] if wheel is None else [str(wheel / "pip")]
        quietly = ["--quiet", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
        command = [str(folder / "bin" / "python"), "-I", *pip, "install", *quietly, "--find-links", str(links)]
        self.run([*command, f"fedge=={version}"], "its wheels cannot be installed")

    def probe(self, folder: Path) -> str:
        """The version that a release says it is, once all of it has been loaded, as the client's user.

        Raises:
            RefusedError: it cannot be loaded.
        """
        return self.run(
            [str(folder / "bin" / "python"), "-I", "-c", _PROBE], "the new client does not start", user=self.user
        )

    def run(self, command: list[str], wrong: str, *, said: str = "", user: str = "", limit: float = 900.0) -> str:
        """Run a program; what it prints.

        Raises:
            RefusedError: it fails.
        """
        who: dict[str, Any] = {}
        if user and not os.geteuid():
            who = {"user": pwd.getpwnam(user).pw_uid, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        how: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "cwd": "/", "env": environment}
        try:
            done = subprocess.run(command, input=said, timeout=limit, **how, **who)  # noqa: S603
        except (OSError, LookupError, subprocess.TimeoutExpired) as error:
            raise RefusedError(f"{wrong}: {error}") from error
        if done.returncode < 0:
            raise RefusedError(f"{wrong}: ended by {signal.Signals(-done.returncode).name}")
        if done.returncode:
            last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-3:]
            raise RefusedError(f"{wrong}: {' / '.join(last)[-300:]}")
        return str(done.stdout).strip()

    def restart(self) -> None:
        """Start the client anew."""
        # A client that waits to be started again for the fifth time is started now, and counted from nothing.
        for verb in (["reset-failed"], ["restart", "--no-block"]):
            subprocess.run([self.systemctl, *verb, UNIT], check=False)  # noqa: S603

    def restarts(self) -> int:
        """How often the client has ended by itself since it was started."""
        show = [self.systemctl, "show", "--property=NRestarts", "--value", UNIT]
        found = subprocess.run(show, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
        return int(found) if found.isdigit() else 0
