"""The embedded broker: mosquitto where it is installed, else amqtt (demo grade, on loopback), gone with its server."""

import contextlib
import dataclasses
import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Literal, Self

from broker_server.broker_config import mosquitto
from broker_server.broker_config.programs import find
from broker_server.broker_config.spec import OVERHEAD, BrokerSpec
from edge_client.address import Address
from edge_client.errors import ConfigError, TransportError

Kind = Literal["mosquitto", "amqtt"]

_START_SECONDS = 15.0
_STOP_SECONDS = 10.0
_PORT_SECONDS = 5.0
"""A broker whose server was killed takes a moment to end, and its port with it."""
_POLL_SECONDS = 0.02
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 (what it means to listen there)

# Anonymous is safe here because the listener is on loopback.
_MOSQUITTO_CONF = """\
listener {port} {host}
allow_anonymous true
{limits}connection_messages false
log_dest stderr
log_type error
log_type warning
"""
_PACKET, _QUEUE = 2_000_000 + OVERHEAD, 100_000


def find_mosquitto() -> Path | None:
    """Where mosquitto is installed; None where it is not."""
    return find("mosquitto")


class EmbeddedBroker:
    """A running broker; ``start`` makes one, ``stop`` or the end of this process (even by SIGKILL) ends it."""

    def __init__(
        self, kind: Kind, host: str, port: int, log: Path, process: subprocess.Popen[bytes], *, tls: bool = False
    ) -> None:
        self.kind = kind
        """``mosquitto``, or ``amqtt``, which is for demos only."""
        self.url = str(Address(host, port, tls=tls))
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
        spec: BrokerSpec | None = None,
    ) -> Self:
        """Start a broker and wait until it accepts connections; ``port`` 0 picks a free one.

        ``directory`` (made where missing) takes its configuration and log. With a ``spec``, whose host and port are
        replaced, it asks for certificates; without one it lets anybody in, and is on loopback only.

        Raises:
            ConfigError: ``host`` is not loopback and there is no ``spec``, or the broker asked for is not installed.
            TransportError: the port stays taken for some seconds, or the broker does not start; the message ends with
                its last words.
        """
        if spec is None and not Address(host, port).loopback:
            raise ConfigError(
                f"broker.host is {host!r}; expected 127.0.0.1, localhost or ::1: the embedded broker lets anybody in. "
                "For other machines make an authority (fedge ca init) and name it in trust.authority, "
                "or run a broker of your own and name it in broker.url"
            )
        chosen, program = _choose(kind)
        if spec is not None and program is None:
            raise ConfigError(
                "trust.authority is set and no mosquitto was found: amqtt cannot ask for certificates; "
                "install it (`apt install mosquitto`, `brew install mosquitto`)"
            )
        port = _await_port(host, port)
        directory.mkdir(parents=True, exist_ok=True)
        if program is None:
            command = [sys.executable, "-m", "broker_server.amqtt_broker", host, str(port)]
        else:
            command = [str(program), "-c", str(_configure(directory, host, port, spec))]
        log = directory / f"{chosen}.log"
        with log.open("wb") as stream:
            near = _EVERYWHERE.get(host, host)
            broker = cls(chosen, near, port, log, _guarded(command, stream), tls=spec is not None)
        try:
            broker._wait(near, port)
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


def _configure(directory: Path, host: str, port: int, spec: BrokerSpec | None) -> Path:
    if spec is not None:
        return mosquitto.write(directory, dataclasses.replace(spec, host=host, port=port))
    configuration = directory / "mosquitto.conf"
    text = _MOSQUITTO_CONF.format(host=host, port=port, limits=mosquitto.limits(_PACKET, _QUEUE))
    configuration.write_text(text, encoding="utf-8")
    return configuration


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
