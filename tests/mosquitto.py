"""A mosquitto on loopback in a process of its own, to be killed and started again by a test."""

import getpass
import socket
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from broker_server.broker import find_mosquitto

PROGRAM = find_mosquitto()
needs_mosquitto = pytest.mark.skipif(PROGRAM is None, reason="needs the Debian package mosquitto")
_CONF = """\
listener {port} 127.0.0.1
allow_anonymous true
user {user}
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
log_dest stderr
"""
_PERSISTENT = """\
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval {changes}
"""


class Mosquitto:
    """One broker and its port; with persistence it saves what it holds after so many ``changes``."""

    def __init__(self, folder: Path, *, changes: int = 1) -> None:
        folder.mkdir(parents=True)
        self.folder, self._changes = folder, changes
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, persistence: bool) -> None:
        """Begin a life, and wait until it takes connections; without ``persistence`` it knows nothing of the ones
        before, with it what the last life that had it has saved."""
        text = _CONF.format(port=self.port, user=getpass.getuser())
        if persistence:
            text += _PERSISTENT.format(folder=self.folder.absolute(), changes=self._changes)
        conf = self.folder / "mosquitto.conf"
        conf.write_text(text)
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen([str(PROGRAM), "-c", str(conf)], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "mosquitto.log").read_text()[-1000:])

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
