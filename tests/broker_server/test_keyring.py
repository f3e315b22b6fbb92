"""The server's keys: who is enrolled is looked up again when that changes, and certificates expire without a change."""

import pytest

from broker_server.keyring import Keyring
from edge_client.errors import TrustError
from edge_client.trust.keys import SigningKey
from edge_client.trust.speech import signed_member
from edge_client.wire import messages as m
from edge_client.wire.transfer import refer

FEDERATION, PI, PO = (SigningKey.generate() for _ in range(3))


class Devices:
    def __init__(self, **keys):
        self.now, self.number, self.asked = dict(keys), 1, 0

    def revision(self):
        return self.number

    def keys(self, now):
        self.asked += 1
        return {client: key for client, (key, expires) in self.now.items() if now < expires}


def test_keys_are_read_when_they_change_and_once_in_a_while():
    devices = Devices(pi=(PI.public, 1e9))
    ring = Keyring(FEDERATION, (FEDERATION.public,), devices)
    assert ring.key("pi") is None
    assert ring.refresh(0.0) == (("pi",), ())
    assert ring.key("pi") == PI.public
    assert ring.refresh(1.0) == ((), ())
    assert devices.asked == 1
    devices.now, devices.number = {"pi": (PO.public, 1e9), "po": (PO.public, 600.0)}, 2
    assert ring.refresh(2.0) == (("pi", "po"), ())
    assert ring.refresh(700.0) == ((), ("po",))
    devices.now, devices.number = {}, 3
    assert ring.refresh(701.0) == ((), ("pi",))
    assert ring.key("pi") is None


def test_a_device_and_a_server_with_their_keys_believe_each_other(tmp_path):
    ring = Keyring(FEDERATION, (FEDERATION.public,), Devices(pi=(PI.public, 1e9)))
    ring.refresh(0.0)
    host = ring.host("demo", 7)
    pins = (PO.public, FEDERATION.public)  # while keys are rotated, there are two
    member, witness = signed_member("demo", "pi", PI, lambda: pins, tmp_path, 100.0)
    offer = m.Offer("demo", 7, refer(b"bundle", chunk=1024), 1.0)
    assert member.hear(host.proclaim(offer)) == offer
    hello = m.Hello(7, b"bootboot", bytes(32), 0, bytes(32), 1, True)
    assert host.hear("pi", member.say(hello, 7)).message == hello
    receipt = m.Receipt(7, 1, "recorded")
    assert member.hear(host.tell("pi", receipt)) == receipt
    witness.remember(member.newest, 50.0)
    again, _ = signed_member("demo", "pi", PI, lambda: pins, tmp_path, 0.0)
    assert (again.life, again.newest, again.passed) == (101, member.newest, 50.0)
    with pytest.raises(TrustError, match="an old offer"):
        again.hear(ring.host("demo", 6).proclaim(m.Offer("demo", 6, offer.bundle, 1.0)))


def test_a_device_with_another_key_is_not_believed(tmp_path):
    ring = Keyring(FEDERATION, (FEDERATION.public,), Devices(pi=(PI.public, 1e9)))
    ring.refresh(0.0)
    impostor, _ = signed_member("demo", "pi", PO, lambda: (FEDERATION.public,), tmp_path, 0.0)
    with pytest.raises(TrustError, match="not that of pi"):
        ring.host("demo", 7).hear("pi", impostor.say(m.Goodbye(b"bootboot"), 0))


def test_a_second_server_speaks_with_the_federations_own_key(tmp_path):
    ring = Keyring(FEDERATION, (FEDERATION.public,), Devices())
    assert ring.key("fs-1234") == FEDERATION.public
    assert ring.key("fs") is None
