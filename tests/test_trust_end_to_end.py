"""A federation that signs, with commands, real mosquitto and a real device; and a man who reaches its broker."""

import pytest

from broker_server import authority_cli
from broker_server.broker import find_mosquitto
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.tls import Tls
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from tests.federation import Joining, Serving, enrolled, federation, fedge, misconduct

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")

TOPICS = Topics("toys")


def test_rounds_are_signed_from_the_offer_to_the_receipt(tmp_path):
    with federation(tmp_path) as (authority, url):
        enrolled(authority, tmp_path / "pi-7" / "identity", "pi-7", authority_cli.time.time())
        with Serving(tmp_path) as server, Joining(tmp_path, url, "pi-7") as device:
            assert "1 clients" in server.until("round 1 ")
            server.until("ended: 3 rounds are done")
        assert not any("dropped" in line for line in server.lines + device.lines)
    assert (tmp_path / "pi-7" / "witness.msgpack").stat().st_mode & 0o777 == 0o600


def test_who_reaches_the_broker_as_another_deceives_nobody(tmp_path):
    """A man with the broker's own rights, who may write everywhere; and a device that is enrolled and lies."""
    with federation(tmp_path, rounds=1) as (authority, url):
        liar = enrolled(authority, tmp_path / "liar" / "identity", "liar", authority_cli.time.time())
        enrolled(authority, tmp_path / "pi-7" / "identity", "pi-7", authority_cli.time.time())
        address, broker = Address.parse(url), Tls.of(authority.folder, "server")
        forged = m.Offer("toys", 2**40, m.BlobRef(bytes(32), 5, 1024, b"harm!"), 0.0)
        with Peer(address, "man", tls=broker) as man:
            man.publish(TOPICS.offer, m.encode(forged), retain=True)
            with Joining(tmp_path, url, "pi-7") as device:
                assert "not signed" in device.until("dropped a message on fedge/toys/pub/offer")
                with Serving(tmp_path) as server:
                    assert "not signed" in server.until("dropped a message on fedge/toys/pub/offer")
                    # In another device's name, without its key: that is no strike against who is named.
                    hello = m.Hello(1, b"boot0000", bytes(32), 0, bytes(32), 10**6, True)
                    with Peer(address, "liar", tls=liar.tls) as speaks:
                        for _ in range(20):
                            speaks.publish(TOPICS.up("liar"), m.encode(hello))
                    server.until("ended: 1 rounds are done")
                    assert not any("not listened to" in line for line in server.lines)
        assert misconduct(tmp_path) == []


def test_a_revoked_device_is_not_asked_any_more(tmp_path):
    with federation(tmp_path, rounds=1000) as (authority, url):
        enrolled(authority, tmp_path / "pi-7" / "identity", "pi-7", authority_cli.time.time())
        with Serving(tmp_path) as server, Joining(tmp_path, url, "pi-7"):
            server.until("round 2 ")
            assert "pi-7 is revoked" in fedge("revoke", "pi-7", "-a", authority.folder)
            server.until("pi-7 is not enrolled any more")
