import os
import select
import signal
import socket
import subprocess
import sys
import threading
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
import psutil
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from broker_server import broker as module
from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.broker_config import programs
from edge_client.errors import ConfigError, TransportError

KINDS = [
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
    ),
    "amqtt",
]


@pytest.fixture(scope="module", params=KINDS)
def broker(request, tmp_path_factory):
    with EmbeddedBroker.start(tmp_path_factory.mktemp("broker"), kind=request.param) as running:
        assert running.kind == request.param
        yield running


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.scheme == "mqtt"
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def test_a_retained_chunk_comes_through(broker):
    payload = bytes(range(256)) * 4096  # 1 MiB, the largest chunk that a federation may use
    arrived = threading.Event()
    found: list[bytes] = []

    def on_message(client: mqtt.Client, userdata: object, message: mqtt.MQTTMessage) -> None:
        found.append(message.payload)
        arrived.set()

    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.on_message = on_message
    client.connect(*address(broker.url))
    client.loop_start()
    try:
        client.publish("chunk/1", payload, qos=1, retain=True).wait_for_publish(20)
        client.subscribe("chunk/1", qos=1)
        assert arrived.wait(20)
        assert found == [payload]
    finally:
        client.disconnect()
        client.loop_stop()


def test_a_taken_port_is_named(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PORT_SECONDS", 0.1)
    host, port = address(broker.url)
    with pytest.raises(TransportError, match=rf"port {port} on 127\.0\.0\.1 cannot be used .*broker\.port"):
        EmbeddedBroker.start(tmp_path, kind=broker.kind, host=host, port=port)


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_frees_the_port_and_leaves_no_process(tmp_path, kind):
    running = EmbeddedBroker.start(tmp_path / "new" / "folder", kind=kind)
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    assert len(family) == 2
    assert running.running
    running.stop()
    running.stop()
    assert not running.running
    assert psutil.wait_procs(family, timeout=5)[1] == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address(running.url), timeout=1).close()


def test_a_port_that_is_about_to_be_free_is_waited_for(tmp_path, monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    tries = []

    def bind(host: str, wanted: int, free=module._free_port) -> int:
        tries.append(wanted)
        if len(tries) == 3:
            taken.close()  # the broker of a server that was killed has ended
        return free(host, wanted)

    monkeypatch.setattr(module, "_free_port", bind)
    with EmbeddedBroker.start(tmp_path, port=port) as running:
        assert address(running.url) == ("127.0.0.1", port)
    assert tries == [port] * 3


_SERVER = """
import sys
from pathlib import Path
from threading import Thread, Event
from broker_server.broker import EmbeddedBroker
started = []
thread = Thread(target=lambda: started.append(EmbeddedBroker.start(Path(sys.argv[1]), kind=sys.argv[2])))
thread.start(); thread.join()  # the thread that started it is gone: the broker must not mind
print(started[0].pid, flush=True)
Event().wait()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_it_dies_with_a_server_that_is_killed(tmp_path, kind):
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(tmp_path), kind], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert select.select([server.stdout], [], [], 30)[0]
    guard = psutil.Process(int(server.stdout.readline()))
    family = [guard, *guard.children(recursive=True)]
    assert all(process.is_running() for process in family)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    server.stdout.close()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_broker_that_ends_at_once_is_quoted(tmp_path, monkeypatch):
    program = tmp_path / "mosquitto"
    program.write_text("#!/bin/sh\necho 'Error: no such option' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(TransportError, match=r"ended at once: Error: no such option; see .*mosquitto\.log"):
        EmbeddedBroker.start(tmp_path / "state", kind="mosquitto")


def test_only_loopback(tmp_path):
    with pytest.raises(ConfigError, match=r"broker\.host is '0\.0\.0\.0'; expected 127\.0\.0\.1.*trust\.authority"):
        EmbeddedBroker.start(tmp_path, host="0.0.0.0")


def test_without_mosquitto_auto_takes_amqtt_and_mosquitto_is_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "PLACES", (str(tmp_path),))
    assert find_mosquitto() is None
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        EmbeddedBroker.start(tmp_path, kind="mosquitto")
    with EmbeddedBroker.start(tmp_path) as running:
        assert running.kind == "amqtt"
