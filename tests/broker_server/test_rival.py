"""The second server of a federation refuses while the first lives, on whatever machine: they meet at the broker."""

import asyncio
from functools import partial

import pytest

from broker_server.connection import server_link
from broker_server.entrance import enter
from broker_server.keyring import Keyring
from broker_server.rival import refuse_rival
from broker_server.server import Server
from edge_client.errors import LedgerError
from edge_client.transport import MqttLink
from edge_client.trust.keys import SigningKey
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from tests.broker_server.test_server import settings
from tests.edge_client.doctor.test_broker import PLAIN, mosquitto, needs_mosquitto

TOPICS = Topics("toys")


def federation(folder, address):
    folder.mkdir()
    return settings(folder, broker={"url": str(address)})


class Nobody:
    """Nobody is enrolled."""

    def revision(self):
        return 0

    def keys(self, now):
        return {}


@needs_mosquitto
@pytest.mark.parametrize("signs", [False, True])
def test_the_second_server_refuses_while_the_first_lives_and_serves_once_it_is_gone(tmp_path, signs):
    key = SigningKey.generate()
    keyring = Keyring(key, (key.public,), Nobody()) if signs else None

    def server(config, address, **more):
        fit = partial(enter, address=address, log=print, keyring=keyring)
        return Server(config, print, server_link(config, address), fit=fit, keyring=keyring, **more)

    async def play(address):
        here, there = federation(tmp_path / "here", address), federation(tmp_path / "there", address)
        started, taken = asyncio.Event(), asyncio.Event()
        first = server(here, address, on_start=lambda _: started.set())
        life = asyncio.ensure_future(first.run())
        await asyncio.wait_for(started.wait(), 20)
        while not first._online:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(LedgerError, match=r"another server of it lives at broker .* \(epoch [0-9]+\); stop"):
            await asyncio.wait_for(server(there, address).run(), 20)
        assert not life.done()
        first.stop("the machine is needed")
        await life
        second = server(there, address, on_start=lambda _: taken.set())
        life = asyncio.ensure_future(second.run())
        await asyncio.wait_for(taken.wait(), 20)
        second.stop("enough")
        await life

    with mosquitto(tmp_path, PLAIN) as address:
        asyncio.run(play(address))


@needs_mosquitto
@pytest.mark.parametrize("finished", [True, False])
def test_what_a_dead_server_left_behind_does_not_keep_the_next_one_out(tmp_path, finished):
    class Silent:
        def connected(self):
            offer = m.Offer("toys", 7, transfer.refer(b"b", chunk=1024), 1.0, finished=finished)
            link.publish(TOPICS.offer, m.encode(offer), retain=True)
            link.publish(TOPICS.offer + "x", b"mark")
            up.set()

        def disconnected(self, reason):
            raise AssertionError(reason)

    async def play(address):
        nonlocal link, up
        link, up = MqttLink(address, "dead"), asyncio.Event()
        life = asyncio.ensure_future(link.run(Silent()))
        await up.wait()
        await link.close()
        await life
        await refuse_rival(federation(tmp_path / "here", address), address)

    link, up = None, None
    with mosquitto(tmp_path, PLAIN) as address:
        asyncio.run(play(address))


def test_an_embedded_broker_has_no_other_server(tmp_path):
    asyncio.run(refuse_rival(settings(tmp_path), None))
