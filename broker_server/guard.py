"""Run a command that must not outlive its parent: ``python -m broker_server.guard COMMAND ...``.

The guard ends the command when its own standard input closes, which happens when the parent closes the pipe and also
when the parent is killed with SIGKILL. Linux could do it with ``PR_SET_PDEATHSIG``, but that signal follows a *thread*
of the parent, needs code between fork and exec, and does not exist on macOS.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 3.0


def watch(command: Sequence[str]) -> int:
    """Run ``command`` until it ends or the parent lets go; returns its exit status."""
    parent = os.getppid()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 (our own command line)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        # A forked sibling may hold a copy of the pipe open; a dead parent still shows as another parent id.
        if readable or os.getppid() != parent:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_SECONDS)
            if child.poll() is None:
                child.kill()
            break
    return child.wait()


if __name__ == "__main__":
    raise SystemExit(watch(sys.argv[1:]))
