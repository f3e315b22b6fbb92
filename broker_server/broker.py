"""The embedded broker: mosquitto where it is installed, else amqtt (demo grade), on loopback, gone with its server."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Literal, Self

from edge_client.errors import ConfigError, TransportError

Kind = Literal["mosquitto", "amqtt"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/opt/mosquitto/sbin")
_START_SECONDS = 15.0
_STOP_SECONDS = 10.0
_PORT_SECONDS = 5.0
"""A broker whose server was killed takes a moment to end, and its port with it."""
_POLL_SECONDS = 0.02

# Anonymous is safe here because the listener is on loopback. The queue is long because a full one drops messages and
# acknowledges them all the same (mosquitto 2.0.11: 1,020 of 2,000 retained chunks arrived with the default of 1,000).
# Persistence is off: what must survive is in the ledger and is retained again at the next start.
_MOSQUITTO_CONF = """\
listener {port} {host}
allow_anonymous true
persistence false
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
message_size_limit 2000000
sys_interval 0
connection_messages false
log_dest stderr
log_type error
log_type warning
"""


def find_mosquitto() -> Path | None:
    """Where mosquitto is installed: on PATH, or in the places where Debian, Homebrew and source builds put it."""
    # Debian keeps it in /usr/sbin, which is not on an ordinary user's PATH.
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(_PLACES))
    return None if found is None else Path(found)


class EmbeddedBroker:
    """A running broker; ``start`` makes one, ``stop`` or the end of this process (even by SIGKILL) ends it."""

    def __init__(self, kind: Kind, host: str, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.kind = kind
        """``mosquitto``, or ``amqtt``, which is for demos only."""
        self.url = f"mqtt://{f'[{host}]' if ':' in host else host}:{port}"
        self.log = log
        """The file with the broker's errors and warnings."""
        self._process = process

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        kind: Literal["auto", "mosquitto", "amqtt"] = "auto",
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> Self:
        """Start a broker and wait until it accepts connections; ``port`` 0 picks a free one.

        ``directory`` (made where missing) takes its configuration and log.

        Raises:
            ConfigError: ``host`` is not loopback, or the broker asked for is not installed.
            TransportError: the port stays taken for some seconds, or the broker does not start; the message ends with
                its last words.
        """
        if host not in _LOOPBACK:
            raise ConfigError(
                f"broker.host is {host!r}; expected one of {', '.join(_LOOPBACK)}: the embedded broker lets "
                "anybody in. For other machines run a mosquitto with passwords and name it in broker.url"
            )
        chosen, program = _choose(kind)
        port = _await_port(host, port)
        directory.mkdir(parents=True, exist_ok=True)
        if program is None:
            command = [sys.executable, "-m", "broker_server.amqtt_broker", host, str(port)]
        else:
            configuration = directory / "mosquitto.conf"
            configuration.write_text(_MOSQUITTO_CONF.format(host=host, port=port), encoding="utf-8")
            command = [str(program), "-c", str(configuration)]
        log = directory / f"{chosen}.log"
        with log.open("wb") as stream:
            broker = cls(chosen, host, port, log, _guarded(command, stream))
        try:
            broker._wait(host, port)
        except BaseException:
            broker.stop()
            raise
        return broker

    @property
    def pid(self) -> int:
        """Process id of the guard that holds the broker; see ``broker_server.guard``."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the broker's process is alive."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the broker and wait until it is gone; stopping twice is harmless."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait(self, host: str, port: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if not self.running:
                raise TransportError(
                    f"{self.kind} on {host}:{port} ended at once: {self._last_words()}; see {self.log}"
                )
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                return
            time.sleep(_POLL_SECONDS)
        raise TransportError(
            f"{self.kind} does not answer on {host}:{port} after {_START_SECONDS:g} s: {self._last_words()}; "
            f"see {self.log}"
        )

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def _choose(kind: Literal["auto", "mosquitto", "amqtt"]) -> tuple[Kind, Path | None]:
    mosquitto = None if kind == "amqtt" else find_mosquitto()
    if mosquitto is not None:
        return "mosquitto", mosquitto
    if kind == "mosquitto":
        raise ConfigError(
            'broker.kind is "mosquitto" and no mosquitto was found; install it '
            '(`apt install mosquitto`, `brew install mosquitto`), or set broker.kind = "auto"'
        )
    if importlib.util.find_spec("amqtt") is None:
        raise ConfigError(
            "no broker is installed; install mosquitto (`apt install mosquitto`), "
            "or the demo broker with `pip install 'fedge[server]'`, or name a broker in broker.url"
        )
    return "amqtt", None


def _await_port(host: str, port: int) -> int:
    """The port, once it is free."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            return _free_port(host, port)
        except TransportError:
            if port == 0 or time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the brokers do: a connection that lingers in TIME_WAIT does not make the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TransportError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "stop the program that has it, or set broker.port to another one, 0 for any"
            ) from error
        return int(probe.getsockname()[1])


def _guarded(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal reaches the server, which ends the broker when it is done with it.
    return subprocess.Popen(  # noqa: S603 (our own command line)
        [sys.executable, "-m", "broker_server.guard", *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
