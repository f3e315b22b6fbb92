"""Signed voices: each believes what the other says, once; whatever a man between them does is refused with a reason."""

import msgspec
import pytest

from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire.envelope import Stamp, unwrap, wrap
from edge_client.wire.transfer import refer
from edge_client.wire.voice import PlainHost, PlainMember, SignedHost
from tests import signing

BOOT, TWIN = b"bootboot", b"bootBOOT"
BUNDLE = refer(b"bundle", chunk=1024)
RECEIPT = m.Receipt(5, 1, "recorded")


def member(client="pi", life=1, *, federation="demo", newest=None, key=None):
    return signing.member(federation, client, life, key=key, newest=newest)


def host(epoch=5, *, federation="demo", key=signing.FEDERATION, revoked=()):
    return signing.host(federation, epoch, key=key, revoked=revoked)


def hello(boot=BOOT, epoch=5):
    return m.Hello(epoch, boot, BUNDLE.sha256, 0, bytes(32), 10, True)


def offer(epoch=5, **more):
    return m.Offer("demo", epoch, BUNDLE, 0.0, **more)


def met(**options):
    """A member and a host that have heard of each other."""
    one, server = member(**options), host()
    one.hear(server.proclaim(offer()))
    server.hear("pi", one.say(hello(), 5))
    return one, server


def refused(match, call, *arguments):
    with pytest.raises(WireError, match=match or None):
        call(*arguments)


# What is believed.


def test_each_side_believes_the_other():
    one, server = met()
    assert one.hear(server.tell("pi", RECEIPT)) == RECEIPT
    said = m.Upload(5, 1, BUNDLE)
    assert server.hear("pi", one.say(said, 5)) == (said, False, False)
    assert one.newest == Stamp(5, 0, 1)


def test_a_signed_message_is_understood_by_who_does_not_ask_for_signatures():
    one, server = met()
    assert PlainMember().hear(server.tell("pi", RECEIPT)) == RECEIPT
    assert PlainHost().hear("pi", one.say(hello(), 5)).message == hello()


def test_signing_costs_at_most_84_bytes():
    one = member(life=2_000_000_000)
    one.say(hello(), 5)
    plain, signed = (len(voice.say(RECEIPT, 1_800_000_000)) for voice in (PlainMember(), one))
    assert 64 < signed - plain <= 84


def test_the_bytes_of_a_signed_message_do_not_change():
    signed = SignedHost("demo", 1, lambda data: bytes(64), lambda _: None, lambda *a: True, lambda *a: True).tell(
        "pi", RECEIPT
    )
    assert signed.hex() == "95010994" + "0501" + "a8" + b"recorded".hex() + "a0" + "c440" + "00" * 64 + "93010001"


# What a man at the broker does.


@pytest.mark.parametrize("say", ["server", "device", "offer"])
def test_a_message_of_which_any_bit_is_changed_is_refused(say):
    one, server = met()
    payload = {
        "server": lambda: server.tell("pi", RECEIPT),
        "device": lambda: one.say(m.Decline(5, 1, "no"), 5),
        "offer": lambda: server.proclaim(offer()),
    }[say]()
    hear = one.hear if say != "device" else lambda changed: server.hear("pi", changed)
    for at in range(len(payload)):
        for bit in (1, 128):
            changed = payload[:at] + bytes([payload[at] ^ bit]) + payload[at + 1 :]
            refused("", hear, changed)
    hear(payload)


def test_an_unsigned_message_is_refused_by_both():
    one, server = met()
    for payload in (m.encode(RECEIPT), m.encode(offer())):
        refused("not signed", one.hear, payload)
    refused("not signed", server.hear, "pi", m.encode(hello()))
    refused("not signed", server.overhear, m.encode(offer()))


def test_a_signature_without_a_stamp_or_a_stamp_without_a_signature_is_none():
    one, server = met()
    signed = unwrap(server.tell("pi", RECEIPT))
    refused("not signed", one.hear, wrap(signed.number, bytes(signed.body), signed.signature))
    refused("not signed", one.hear, wrap(signed.number, bytes(signed.body), b"", signed.stamp))


def test_what_is_said_twice_is_believed_once():
    one, server = met()
    told, said = server.tell("pi", RECEIPT), one.say(m.Upload(5, 1, BUNDLE), 5)
    one.hear(told)
    server.hear("pi", said)
    refused("said before", one.hear, told)
    refused("said before", server.hear, "pi", said)


def test_what_comes_after_something_newer_is_not_believed():
    one, server = met()
    first, second = server.tell("pi", m.Receipt(5, 1, "void")), server.tell("pi", RECEIPT)
    assert one.hear(second) == RECEIPT
    refused("said before", one.hear, first)


def test_a_message_for_one_client_is_not_believed_by_another():
    one, server = met()
    other = member("po")
    other.hear(server.proclaim(offer()))
    refused("signature", other.hear, server.tell("pi", RECEIPT))
    refused("signature is not that of po", server.hear, "po", one.say(hello(), 5))


def test_a_message_of_one_side_is_not_believed_as_one_of_the_other():
    one, server = met()
    refused("signature", one.hear, one.say(RECEIPT, 5))
    server.tell("pi", RECEIPT)
    refused("signature", server.hear, "pi", server.tell("pi", RECEIPT))
    refused("another life", one.hear, server.proclaim(RECEIPT))


def test_a_message_of_another_federation_is_refused():
    one, server = met()
    refused("signature", one.hear, host(federation="other").proclaim(offer()))
    refused("signature", server.hear, "pi", member(federation="other", life=2).say(hello(), 5))


def test_a_key_that_is_not_the_federations_or_not_the_devices_is_refused():
    one, server = met()
    refused("signature", one.hear, host(key=b"mallory").proclaim(offer(9)))
    refused("signature is not that of pi", server.hear, "pi", member(key=b"mallory", life=9).say(hello(), 5))
    refused("signature", server.overhear, host(key=b"mallory").proclaim(offer(9)))


def test_a_device_that_is_not_enrolled_any_more_is_refused():
    one, server = member(), host(revoked={"pi"})
    refused("not enrolled", server.hear, "pi", one.say(hello(), 5))


# Old offers.


def test_an_older_offer_is_refused_and_the_newest_one_believed_again():
    server = host()
    first, second = server.proclaim(offer()), server.proclaim(offer(finished=True))
    one = member()
    one.hear(second)
    refused("an old offer", one.hear, first)
    one.hear(second)
    refused("an old offer", one.hear, host(4).proclaim(offer(4)))


def test_a_device_remembers_the_newest_offer_over_its_lives():
    before, _ = met()
    after = member(life=2, newest=before.newest)
    refused("an old offer", after.hear, host(4).proclaim(offer(4)))
    after.hear(host(6).proclaim(offer(6)))


def test_an_offer_says_the_epoch_that_it_was_said_in():
    refused("was said in epoch 5", member().hear, host().proclaim(offer(6)))


# Lives and epochs.


def test_what_was_said_to_an_earlier_life_is_not_believed():
    one, server = met()
    told = server.tell("pi", RECEIPT)
    refused("another life", member(life=2, newest=one.newest).hear, told)


def test_a_new_life_is_believed_at_once_and_told_from_then_on():
    _, server = met()
    again = member(life=2)
    again.hear(server.proclaim(offer()))
    assert server.hear("pi", again.say(hello(TWIN), 5)).message == hello(TWIN)
    assert again.hear(server.tell("pi", RECEIPT)) == RECEIPT


def test_what_a_device_said_in_an_earlier_life_is_not_believed():
    one, server = met()
    said = one.say(m.Upload(5, 1, BUNDLE), 5)
    server.hear("pi", said)
    server.hear("pi", member(life=2).say(hello(TWIN), 5))
    refused("said before", server.hear, "pi", said)


def test_what_a_device_said_under_an_older_epoch_is_stale():
    one, server = met()[0], host(6)
    assert server.hear("pi", one.say(hello(), 5)).stale
    refused("said in epoch 7", server.hear, "pi", one.say(hello(epoch=7), 7))


def test_after_a_restart_of_the_server_only_its_own_epoch_is_believed():
    one, before = met()
    told = before.tell("pi", RECEIPT)
    after = host(6)
    one.hear(after.proclaim(offer(6)))
    refused("said before", one.hear, told)
    server = after
    server.hear("pi", one.say(hello(epoch=6), 6))
    assert one.hear(server.tell("pi", RECEIPT)) == RECEIPT


def test_a_device_that_has_not_spoken_is_not_told_anything():
    one, server = member(), host()
    one.hear(server.proclaim(offer()))
    refused("another life", one.hear, server.tell("pi", RECEIPT))


def test_a_last_will_is_believed_whenever_it_comes_and_takes_nothing_back():
    one, server = member(), host()
    will = one.say(m.Goodbye(BOOT), 0)
    server.hear("pi", one.say(hello(), 5))
    assert server.hear("pi", will) == (m.Goodbye(BOOT), False, False)
    assert server.hear("pi", will).message == m.Goodbye(BOOT)
    assert server.hear("pi", one.say(hello(), 5)).message == hello()


def test_a_last_will_of_somebody_else_is_not():
    _, server = met()
    refused("signature", server.hear, "pi", member(key=b"mallory").say(m.Goodbye(BOOT), 0))


# Two devices with one key.


def test_another_boot_in_the_same_life_is_another_device():
    one, server = met()
    twin = member()
    assert server.hear("pi", twin.say(hello(TWIN), 5)).twin
    assert server.hear("pi", twin.say(hello(TWIN), 5)).twin
    assert server.hear("pi", one.say(hello(), 5)) == (hello(), False, False)


def test_an_earlier_life_that_goes_on_is_another_device():
    one, server = met()
    server.hear("pi", member(life=2).say(hello(TWIN), 5))
    said = one.say(hello(), 5)
    assert server.hear("pi", said).twin
    refused("said before", server.hear, "pi", said)


def test_a_hello_that_is_repeated_is_no_twin():
    one, server = member(), host()
    said = one.say(hello(), 5)
    server.hear("pi", said)
    refused("said before", server.hear, "pi", said)


def test_a_forged_twin_is_none():
    _, server = met()
    refused("signature", server.hear, "pi", member(key=b"mallory").say(hello(TWIN), 5))


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", msgspec.msgpack.encode([1, 1, [], b"x" * 65, [1, 1, 1]]), bytes(200_000)]
)
def test_rubbish_is_refused_before_anything_is_verified(payload):
    never = member()
    never.verify = None
    refused("", never.hear, payload)
    server = host()
    server.verify = None
    refused("", server.hear, "pi", payload)
