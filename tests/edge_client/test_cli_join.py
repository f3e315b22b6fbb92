"""`fedge join`: what is wrong is one line and exit status 2; SIGTERM ends it in good order."""

import asyncio
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from broker_server.broker import EmbeddedBroker, find_mosquitto
from edge_client.address import Address
from edge_client.transport import MqttLink
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import refer
from tests.toy import toy_bundle, toy_data

NOWHERE = "mqtt://127.0.0.1:1"
TOPICS = Topics("demo")
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")


def command(*arguments):
    return [sys.executable, "-m", "edge_client.cli", "join", *arguments]


def environment(tmp_path):
    return os.environ | {"HOME": str(tmp_path)}


BAD = {
    "scheme": (["http://host", "--id", "pi"], "mqtt://host:port"),
    "port": (["mqtt://host:port", "--id", "pi"], "broker URL"),
    "id": ([NOWHERE, "--id", "a/b"], "--id 'a/b'"),
    "wild id": ([NOWHERE, "--id", "#"], "--id '#'"),
    "federation": ([NOWHERE, "--id", "pi", "--federation", "a/#"], "federation 'a/#'"),
    "federation in the URL": ([NOWHERE + "/a/b", "--id", "pi"], "federation 'a/b'"),
    "holdout": ([NOWHERE, "--id", "pi", "--holdout", "1"], "--holdout 1"),
    "uplink": ([NOWHERE, "--id", "pi", "--uplink", "-1"], "--uplink -1"),
    "uplink that is no number": ([NOWHERE, "--id", "pi", "--uplink", "nan"], "--uplink nan"),
    "unsigned over TLS": (["mqtts://broker.example", "--id", "pi"], "say --insecure where you trust the broker"),
    "once enrolled": ([NOWHERE, "--id", "pi", "--state", "ENROLLED"], "so this device was enrolled"),
    "enrolled by halves": ([NOWHERE, "--id", "pi", "--state", "HALF"], "identity is there, so this device was"),
    "damaged state": ([NOWHERE, "--id", "pi", "--state", "STATE"], "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_status_2(tmp_path, name):
    arguments, expected = BAD[name]
    (tmp_path / "index.msgpack").write_bytes(b"\xc1")
    states = {"STATE": tmp_path, "ENROLLED": tmp_path / "enrolled", "HALF": tmp_path / "half"}
    states["ENROLLED"].mkdir()
    (states["ENROLLED"] / "witness.msgpack").touch()
    (states["HALF"] / "identity").mkdir(parents=True)
    arguments = [str(states.get(argument, argument)) for argument in arguments]
    found = subprocess.run(
        command(*arguments, "--data", "x.npz"), capture_output=True, text=True, timeout=30, env=environment(tmp_path)
    )
    assert found.returncode == 2
    assert found.stderr.startswith("fedge: ")
    assert found.stderr.count("\n") == 1
    assert expected in found.stderr
    assert found.stdout == ""


class Server:
    """Retains an offer of the toy bundle and waits for what a client says."""

    def __init__(self, url):
        self.link = MqttLink(Address.parse(url), "server")
        self.inbox = asyncio.Queue()

    def connected(self):
        self.link.subscribe((TOPICS.every_up,))
        offer = m.Offer("demo", 1, refer(toy_bundle(), chunk=1024), 0.0)
        self.link.publish(TOPICS.offer, m.encode(offer), retain=True)

    def disconnected(self, reason):
        pass

    def message(self, topic, payload):
        self.inbox.put_nowait(m.decode(payload))

    async def said(self, kind):
        async with asyncio.timeout(20):
            while not isinstance(message := await self.inbox.get(), kind):
                pass
            return message


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with EmbeddedBroker.start(tmp_path_factory.mktemp("broker"), kind="mosquitto") as running:
        yield running


async def joined(broker, tmp_path, arrays, *options):
    np.savez(tmp_path / "data.npz", **arrays)
    arguments = [broker.url + "/demo", "--id", "pi", "--data", str(tmp_path / "data.npz"), *options]
    return await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(tmp_path),
    )


@needs_mosquitto
def test_data_that_does_not_fit_is_one_line_with_both_shapes(broker, tmp_path):
    async def play():
        server = Server(broker.url)
        life = asyncio.ensure_future(server.link.run(server))
        try:
            client = await joined(broker, tmp_path, toy_data(20, features=7))
            async with asyncio.timeout(30):
                _, errors = await client.communicate()
            assert client.returncode == 2
            joining, line = errors.decode().splitlines()
            assert joining == f"pi: joining 'demo' at {broker.url}"
            assert line.startswith("fedge: ")
            assert "7" in line
            assert "4" in line
            await server.said(m.Goodbye)
        finally:
            await server.link.close()
            await life

    asyncio.run(play())


@needs_mosquitto
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_says_goodbye_and_exits_with_status_0(broker, tmp_path, number):
    async def play():
        server = Server(broker.url)
        life = asyncio.ensure_future(server.link.run(server))
        try:
            client = await joined(broker, tmp_path, toy_data(20), "--holdout", "0.25")
            hello = await server.said(m.Hello)
            assert hello.samples == 15
            client.send_signal(number)
            assert (await server.said(m.Goodbye)).boot == hello.boot
            async with asyncio.timeout(15):
                _, errors = await client.communicate()
            assert client.returncode == 0
            assert errors.decode() == f"pi: joining 'demo' at {broker.url}\n"
            assert (tmp_path / ".local/state/fedge/demo/pi/index.msgpack").exists()
        finally:
            await server.link.close()
            await life

    asyncio.run(play())


def test_a_signal_ends_a_client_that_has_no_broker(tmp_path):
    client = subprocess.Popen(
        command(NOWHERE, "--id", "pi", "--data", "x.npz"), stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    assert client.stderr is not None
    assert "joining" in client.stderr.readline()
    assert "refused" in client.stderr.readline()
    client.send_signal(signal.SIGTERM)
    assert client.wait(15) == 0
    assert "Traceback" not in client.stderr.read()
    client.stderr.close()
