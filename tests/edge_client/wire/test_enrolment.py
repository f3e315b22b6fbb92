"""Messages about enrolment: bounded, signed for one user of one federation, and on topics of their own."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.errors import WireError
from edge_client.trust.keys import SigningKey, verify
from edge_client.wire import enrolment as wire
from edge_client.wire import envelope, messages

KEY = SigningKey.generate()
ASK = wire.Ask("pi-7", b"request", bytes(16), "fedge 1")
TOLD = wire.Told(bytes(16), "issued", "", b"certificate", b"authority", (bytes(32),), 1.8e9)
USER = "@claim-0123abcd"


@pytest.mark.parametrize("message", [ASK, TOLD, wire.Told(bytes(16), "refused", "because")], ids=["ask", "told", "no"])
def test_a_message_arrives_as_it_was_said_and_by_whom(message):
    payload = wire.seal("toys", USER, message, KEY.sign)
    found, covered, signature = wire.unseal("toys", USER, payload, type(message))
    assert found == message
    assert verify(KEY.public, covered, signature)


@pytest.mark.parametrize(("federation", "user"), [("others", USER), ("toys", "@claim-0123abce"), ("toys", "pi-7")])
def test_a_signature_is_for_one_user_of_one_federation(federation, user):
    payload = wire.seal("toys", USER, TOLD, KEY.sign)
    _, covered, signature = wire.unseal(federation, user, payload, wire.Told)
    assert not verify(KEY.public, covered, signature)


def test_no_message_of_the_protocol_is_one_about_enrolment():
    assert not set(wire.TABLE) & set(messages.TABLE)
    with pytest.raises(WireError):
        messages.decode(wire.seal("toys", USER, ASK, KEY.sign))
    with pytest.raises(WireError, match="expected 102"):
        wire.unseal("toys", USER, wire.seal("toys", USER, ASK, KEY.sign), wire.Told)


def replaced(message, **fields):
    body = msgspec.msgpack.encode(msgspec.structs.replace(message, **fields))
    return envelope.wrap(101 if isinstance(message, wire.Ask) else 102, body, bytes(64))


BAD = {
    "id": (ASK, {"client": "a/b"}),
    "id that begins with a dot": (ASK, {"client": ".a"}),
    "id of a user that is no device": (ASK, {"client": "@server"}),
    "long id": (ASK, {"client": "a" * 65}),
    "long request": (ASK, {"csr": bytes(wire.REQUEST_LIMIT + 1)}),
    "no request": (ASK, {"csr": b""}),
    "short nonce": (ASK, {"nonce": bytes(15)}),
    "software that writes on terminals": (ASK, {"software": "\x1b[2J"}),
    "status": (TOLD, {"status": "maybe"}),
    "long certificate": (TOLD, {"certificate": bytes(wire.CERTIFICATE_LIMIT + 1)}),
    "short pin": (TOLD, {"pins": (bytes(31),)}),
    "many pins": (TOLD, {"pins": (bytes(32),) * 9}),
    "time that is none": (TOLD, {"issued": -1.0}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_field_out_of_bounds_is_refused(name):
    message, fields = BAD[name]
    with pytest.raises(WireError):
        wire.unseal("toys", USER, replaced(message, **fields), type(message))


def test_a_long_message_is_not_even_decoded():
    with pytest.raises(WireError, match="at most"):
        wire.unseal("toys", USER, bytes(wire.LIMIT + 1), wire.Ask)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(payload):
    for kind in (wire.Ask, wire.Told):
        with pytest.raises(WireError):
            wire.unseal("toys", USER, payload, kind)
        with pytest.raises(WireError):
            wire.unseal("toys", USER, envelope.wrap(101, msgspec.msgpack.encode(payload)), kind)


def test_topics_name_the_user():
    assert wire.ask_topic("toys", USER) == f"fedge/toys/enrol/{USER}/ask"
    assert wire.told_topic("toys", "pi-7") == "fedge/toys/enrol/pi-7/told"
    assert wire.parse_ask("toys", wire.ask_topic("toys", USER)) == USER
    assert wire.parse_ask("toys", wire.ask_topic("toys", "pi-7")) == "pi-7"


@pytest.mark.parametrize(
    "topic",
    [
        "fedge/others/enrol/pi/ask",
        "fedge/toys/enrol/pi/told",
        "fedge/toys/enrol/pi/ask/more",
        "fedge/toys/enrol/a/b/ask",
        "fedge/toys/enrol/@server/ask",
        "fedge/toys/enrol/@claim-0123ABCD/ask",
        "fedge/toys/enrol/@claim-0123abcd\n/ask",
        "fedge/toys/enrol//ask",
        "fedge/toys/up/pi/ask",
        "",
    ],
)
def test_other_topics_are_refused(topic):
    with pytest.raises(WireError):
        wire.parse_ask("toys", topic)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("fs-1", "fedge's own"),
        ("fd-x", "fedge's own"),
        ("a b", "expected"),
        ("pi\n", "expected"),
        ("@claim-0123abcd", "expected"),
    ],
)
def test_names_that_no_device_has(name, word):
    assert word in str(wire.check_name(name))


def test_names_that_devices_have():
    assert [wire.check_name(name) for name in ("pi-7", "FS-1", "a.b_c", "a" * 64)] == [None] * 4
