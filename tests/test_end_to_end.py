"""The commands in processes of their own, with real brokers, real sockets and real kills."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import paho.mqtt.client as mqtt
import psutil
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.ledger import Ledger
from edge_client.wire import messages as m
from tests.toy import toy_bundle, toy_data

PATIENCE = 60.0
KINDS = [
    "amqtt",
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
    ),
]


class Command:
    """A running ``fedge``; its lines are read as they come."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, "-m", "edge_client.cli", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"COLUMNS": "200"} | environment,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._news.put(line.rstrip())
        self._news.put(None)

    def says(self, words: str) -> str:
        """Wait for a line with these words."""
        while True:
            line = self._news.get(timeout=PATIENCE)
            assert line is not None, f"ended without {words!r}: {self.lines}"
            self.lines.append(line)
            if words in line:
                return line

    def ends(self, patience: float = PATIENCE) -> int:
        """Wait for the end; the exit status."""
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            while not self._news.empty():
                self.lines.append(self._news.get() or "")
            pytest.fail("it does not end: " + "\n".join(self.lines))
        while (line := self._news.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return status

    def kill(self) -> None:
        """SIGKILL, and wait until the children that watch for it are gone too."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait(PATIENCE)
        assert psutil.wait_procs(family, PATIENCE)[1] == []

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._reader.join(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Spy:
    """Hears everything that is said on a broker."""

    def __init__(self, port: int) -> None:
        self._heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
        listening = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = lambda _c, _u, message: self._heard.put((message.topic, message.payload))
        self._client.on_subscribe = lambda *_: listening.set()
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe("fedge/#", qos=1)
        assert listening.wait(PATIENCE)

    def hears(self, *wanted: Callable[[str, object], bool]) -> None:
        """Wait until each of the conditions has held of some message, in any order."""
        open_ = list(wanted)
        while open_:
            topic, payload = self._heard.get(timeout=PATIENCE)
            message = m.decode(payload) if topic.endswith(("/msg", "/offer")) and payload else None
            open_ = [condition for condition in open_ if not condition(topic, message)]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def invitation(client: str) -> Callable[[str, object], bool]:
    return lambda topic, message: topic == f"fedge/toys/down/{client}/msg" and isinstance(message, m.Invitation)


def recorded(client: str) -> Callable[[str, object], bool]:
    return lambda topic, message: (
        topic == f"fedge/toys/down/{client}/msg" and isinstance(message, m.Receipt) and message.status == "recorded"
    )


def goodbye(client: str) -> Callable[[str, object], bool]:
    return lambda topic, message: topic == f"fedge/toys/up/{client}/msg" and isinstance(message, m.Goodbye)


class Federation:
    """Files, processes and spies of one run."""

    def __init__(self, folder: Path, broker: str, *, rounds: int = 2, **sections: str) -> None:
        self.folder, self._open = folder, []
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}/toys"
        (folder / "toy.fedge").write_bytes(toy_bundle(hidden=8))
        for number in range(1, 4):
            np.savez(folder / f"c{number}.npz", **toy_data(20 + 10 * number, seed=number))
        np.savez(folder / "test.npz", **toy_data(100, seed=9))
        self.gate = folder / "gate"
        self.file = folder / "federation.toml"
        self.file.write_text(f"""
            [federation]
            name = "toys"
            bundle = "toy.fedge"
            seed = 5
            [broker]
            {broker.format(port=self.port)}
            [round]
            cohort = 3
            minimum = 3
            deadline = 120.0
            [transfer]
            spread = 0.0
            [evaluation]
            data = "test.npz"
            [stop]
            rounds = {rounds}
            """)

    def run(self, *arguments: object, **environment: str) -> Command:
        self._open.append(Command(*arguments, **environment))
        return self._open[-1]

    def serve(self) -> Command:
        return self.run("serve", self.file)

    def join(self, name: str, *, held: bool = False) -> Command:
        data = "tests.gate:gated" if held else self.folder / f"{name}.npz"
        environment = {"FEDGE_GATE": str(self.gate), "FEDGE_GATE_DATA": str(self.folder / f"{name}.npz")}
        options = ["--id", name, "--data", data, "--state", self.folder / name, "--once"]
        return self.run("join", self.url, *options, **environment)

    def spy(self) -> Spy:
        self._open.append(Spy(self.port))
        return self._open[-1]

    def open_gate(self) -> None:
        """Let those who wait at the gate pass, and all who come later."""
        pipe = os.open(self.gate, os.O_WRONLY)
        self.gate.unlink()
        os.close(pipe)

    def ledger(self) -> Ledger:
        return Ledger.read(self.folder / "state" / "ledger.db")

    def versions(self) -> list[bytes]:
        """The states of all versions that the run made."""
        with self.ledger() as ledger:
            found = [ledger.version(number) for number, _, _ in ledger.versions()]
        return [version.state for version in found if version is not None]

    def close(self) -> None:
        for one in reversed(self._open):
            one.close()


@contextmanager
def federation(folder: Path, broker: str, **more: object) -> Iterator[Federation]:
    made = Federation(folder, broker, **more)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def undisturbed(folder: Path, broker: str) -> list[bytes]:
    """All versions of a run in which nothing goes wrong."""
    with federation(folder, broker) as run:
        os.mkfifo(run.gate)
        server = run.serve()
        server.says("broker: ")
        spy = run.spy()
        clients = [run.join("c1"), run.join("c2"), run.join("c3", held=True)]
        spy.hears(recorded("c1"), recorded("c2"), invitation("c3"))
        run.open_gate()
        assert server.ends() == 0, server.lines
        for client in clients:
            assert client.ends() == 0, client.lines
        return run.versions()


@pytest.mark.parametrize("kind", KINDS)
def test_kills_in_the_middle_of_a_round_change_nothing(tmp_path, kind):
    broker = f'kind = "{kind}"\nport = {{port}}'
    with federation(tmp_path / "killed", broker) as run:
        os.mkfifo(run.gate)
        server = run.serve()
        server.says(f"broker: {kind} on mqtt://127.0.0.1:{run.port}")
        spy = run.spy()
        clients = [run.join("c1"), run.join("c2")]
        victim = run.join("c3", held=True)
        spy.hears(recorded("c1"), recorded("c2"), invitation("c3"))

        victim.kill()
        spy.hears(goodbye("c3"))
        clients.append(run.join("c3", held=True))
        spy.hears(invitation("c3"))

        server.kill()
        server = run.serve()
        server.says("broker: ")
        spy = run.spy()
        status = run.run("status", run.file)
        assert status.ends() == 0
        assert "round 1: train under way, 2 of 3 results recorded" in status.lines[-1]
        run.open_gate()
        spy.hears(recorded("c3"))

        assert server.ends() == 0, server.lines
        assert any("ended: 2 rounds are done" in line for line in server.lines)
        for client in clients:
            assert client.ends() == 0, client.lines
        models = run.run("models", run.file)
        assert models.ends() == 0
        assert any(line.startswith("best: ") and "infer.onnx" in line for line in models.lines)
        with run.ledger() as ledger:
            assert [(done.round, done.clients, done.samples) for done in ledger.rounds()] == [(1, 3, 120), (2, 3, 120)]
            last = int(ledger.get("epoch") or 0)
            tasks = [(last - 1, 1), *((last, number) for number in range(2, 5) if ledger.recorded(last, number))]
            assert [sorted(ledger.recorded(*task)) for task in tasks] == [["c1", "c2", "c3"]] * 2
            assert ledger.open_tasks() == []
        killed = run.versions()
    assert len(killed) == 2
    assert all(killed)
    assert killed == undisturbed(tmp_path / "whole", broker)


def test_a_broker_that_is_not_there_yet_is_named_and_tried_again(tmp_path):
    with federation(tmp_path, 'url = "mqtt://127.0.0.1:{port}"') as run:
        server = run.serve()
        assert server.says("broker: ") == f"broker: mqtt://127.0.0.1:{run.port}"
        assert "refused" in server.says("trying again")
        client = run.join("c1")
        assert str(run.port) in client.says("joining")
        client.says("trying again")
        with EmbeddedBroker.start(tmp_path / "broker", port=run.port) as late:
            assert urlsplit(late.url).port == run.port
            run.spy().hears(
                lambda topic, message: isinstance(message, m.Offer), lambda topic, message: isinstance(message, m.Hello)
            )
            for command in (client, server):
                command.process.send_signal(signal.SIGTERM)
                assert command.ends() == 0, command.lines
        assert any("ended: stopped by signal" in line for line in server.lines)


def test_a_broker_that_ends_and_comes_back_in_the_middle_of_a_round(tmp_path):
    with federation(tmp_path, 'url = "mqtt://127.0.0.1:{port}"') as run:
        os.mkfifo(run.gate)
        with EmbeddedBroker.start(tmp_path / "first", port=run.port):
            server = run.serve()
            server.says("broker: ")
            spy = run.spy()
            clients = [run.join("c1"), run.join("c2"), run.join("c3", held=True)]
            spy.hears(recorded("c1"), recorded("c2"), invitation("c3"))
            spy.close()
        clients[2].says("trying again")
        run.open_gate()
        with EmbeddedBroker.start(tmp_path / "second", port=run.port):
            assert server.ends() == 0, server.lines
            for client in clients:
                assert client.ends() == 0, client.lines
        with run.ledger() as ledger:
            assert [(done.round, done.clients) for done in ledger.rounds()] == [(1, 3), (2, 3)]
            assert sorted(ledger.recorded(int(ledger.get("epoch") or 0), 1)) == ["c1", "c2", "c3"]


def test_simulate_gives_up_on_an_unreachable_broker(tmp_path):
    with federation(tmp_path, 'url = "mqtt://127.0.0.1:{port}"') as run:
        command = run.run("simulate", run.file, "--clients", "3", "--set", f"simulation.data={tmp_path / 'c1.npz'}")
        assert command.ends() == 2
        (line,) = [line for line in command.lines if line.startswith("fedge: ")]
        assert f"127.0.0.1:{run.port}" in line
        assert not any("Traceback" in line for line in command.lines)
        assert not (tmp_path / "state" / "models").exists()


def test_join_with_data_that_does_not_fit(tmp_path):
    with federation(tmp_path, 'kind = "auto"\nport = {port}') as run:
        np.savez(tmp_path / "c1.npz", **toy_data(10, features=6))
        server = run.serve()
        server.says("broker: ")
        client = run.join("c1")
        assert client.ends() == 2
        (line,) = [line for line in client.lines if line.startswith("fedge: ")]
        assert "[6]" in line or "6" in line
        assert "4" in line
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines
