"""Chunks that fit the broker: measured by the server, taken over by its clients."""

import asyncio
import signal

import msgspec
import pytest

from broker_server.connection import server_link
from broker_server.packets import fitted
from broker_server.server import Server
from edge_client.address import Address
from edge_client.data import ArraySource
from edge_client.device import Device, Workshop
from edge_client.errors import TransportError
from edge_client.store import FileCopies, Store
from edge_client.transport import MqttLink
from tests.broker_server.test_server import settings
from tests.edge_client.doctor.test_broker import PLAIN, mosquitto, needs_mosquitto
from tests.nats import free_ports
from tests.test_end_to_end import federation as processes
from tests.toy import toy_bundle, toy_data


def federation(folder, address, **sections):
    return settings(folder, broker={"url": str(address)}, **sections)


@needs_mosquitto
@pytest.mark.parametrize(
    ("limit", "wanted", "chunk", "inline"),
    [
        (131_072, 65_536, 65_536, 16_384),
        (40_000, 65_536, 38_912, 16_384),
        (9_000, 65_536, 7168, 7168),
        (9_000, 1024, 1024, 7168),
    ],
)
def test_chunks_and_messages_stay_below_what_the_broker_takes(tmp_path, limit, wanted, chunk, inline):
    said = []
    with mosquitto(tmp_path, f"{PLAIN}message_size_limit {limit}\n") as address:
        config = federation(tmp_path, address, transfer={"chunk": wanted})
        found = asyncio.run(fitted(config, address, said.append))
    assert (found.transfer.chunk, found.transfer.inline) == (chunk, inline)
    assert msgspec.structs.replace(found, transfer=config.transfer) == config
    assert bool(said) == (found != config)
    assert all(f"at most {chunk:,}, and what travels within a message {inline:,}" in line for line in said)


@needs_mosquitto
def test_a_broker_that_takes_too_little_is_refused(tmp_path):
    with mosquitto(tmp_path, f"{PLAIN}message_size_limit 1500\n") as address:
        config = federation(tmp_path, address)
        with pytest.raises(TransportError, match=r"at most 1,024 bytes; fedge needs 2,048: raise its limit"):
            asyncio.run(fitted(config, address, print))


@needs_mosquitto
def test_a_server_that_may_not_hear_itself_says_so_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_client.doctor.limits._ECHO", 0.5)
    rules, said = tmp_path / "acl", []
    rules.write_text("topic read fedge/+/up/#\ntopic write fedge/+/pub/#\ntopic write fedge/+/down/#\n")
    with mosquitto(tmp_path / "broker", f"{PLAIN}acl_file {rules}\nuser root\n") as address:
        config = federation(tmp_path, address)
        assert asyncio.run(fitted(config, address, said.append)) == config
    assert len(said) == 1
    assert "should read and write fedge/#" in said[0]


def test_our_own_broker_is_not_asked(tmp_path):
    config = settings(tmp_path)
    assert asyncio.run(fitted(config, None, print)) is config


def test_a_broker_that_is_not_there_is_tried_again(tmp_path):
    said = []
    url = f"mqtt://127.0.0.1:{free_ports(1)[0]}"
    config = federation(tmp_path, url)
    with pytest.raises(TransportError, match="refused"):
        asyncio.run(fitted(config, Address.parse(url), said.append, attempts=2))
    assert len(said) == 1
    assert said[0].endswith("; trying again")


@needs_mosquitto
def test_a_federation_on_a_broker_that_takes_four_kibibytes(tmp_path, monkeypatch):
    """Bundle, deltas and updates are larger than that, and clients were told 64 KiB."""
    seen, said = [], []

    async def play(address):
        config = federation(tmp_path, address, codec={"kind": "none"}, stop={"rounds": 2})
        config = await fitted(config, address, said.append)
        assert config.transfer.chunk == 3072
        workshop, lives, devices = Workshop(1), [], []
        for number in range(3):
            source = ArraySource(toy_data(30, features=64, seed=number))
            one = Device(
                client=f"c{number}",
                federation="toys",
                connect=lambda will, number=number: MqttLink(address, f"c{number}", will),
                store=Store(tmp_path / f"c{number}", durable=False),
                copies=FileCopies(tmp_path / f"c{number}"),
                workshop=workshop,
                open_data=lambda manifest, source=source: (source, source),
                log=said.append,
                seed=number,
            )
            devices.append(one)
            lives.append(asyncio.ensure_future(one.run()))
        outcome = await Server(config, said.append, server_link(config, address), on_round=seen.append).run()
        await asyncio.gather(*(one.close() for one in devices))
        await asyncio.gather(*lives)
        workshop.close()
        return outcome

    monkeypatch.setattr("tests.broker_server.test_server.toy_bundle", wide)
    monkeypatch.setattr("tests.broker_server.test_server.toy_data", wide_data)
    with mosquitto(tmp_path / "broker", f"{PLAIN}message_size_limit 4096\nmax_queued_messages 100000\n") as address:
        outcome = asyncio.run(asyncio.wait_for(play(address), 60))
    assert outcome.reason == "2 rounds are done"
    assert [(result.clients, result.samples) for result in seen] == [(3, 90), (3, 90)]
    assert any("at most 3,072" in line for line in said)
    # Without error feedback's loss each update is 4 bytes a parameter: far more than a message holds.
    assert all(result.bytes_up > 3 * 4 * 64 * 32 for result in seen[1:])


def wide(hidden):
    return toy_bundle(features=64, hidden=32)


def wide_data(count, seed):
    return toy_data(count, features=64, seed=seed)


def test_a_server_that_waits_for_its_broker_can_be_stopped(tmp_path):
    with processes(tmp_path, 'url = "mqtt://127.0.0.1:{port}"') as run:
        server = run.serve()
        server.says("trying again")
        server.process.send_signal(signal.SIGTERM)
        assert server.ends() == 0, server.lines
        assert server.lines[-1] == "ended: stopped by signal"
