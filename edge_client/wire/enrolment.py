"""How a device asks for a certificate and what it is told: two messages in a small table of their own.

================================  ====================================================
``fedge/<F>/enrol/<user>/ask``    `Ask`: a certificate request
``fedge/<F>/enrol/<user>/told``   `Told`: a certificate, or why there is none (yet)
================================  ====================================================

``<user>`` is ``@claim-<8 hex>``, or the id of a device that renews its certificate. Both messages travel in the
envelope of all others and are signed over federation, user, number and body: what a user is called at the broker
proves nothing. The Ask is signed with the key of the claim, or the device's own, and the request in it with the key
that is to be certified. The Told is signed with the federation's key, and repeats the Ask's nonce.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_client.errors import WireError
from edge_client.wire import envelope
from edge_client.wire.messages import Moment, Text
from edge_client.wire.topics import CLIENT

LIMIT = 16 * 1024
"""Bytes of the largest message about enrolment; anything longer is dropped unread."""
REQUEST_LIMIT, CERTIFICATE_LIMIT = 2048, 4096
"""Bytes of a certificate request and of a certificate, in DER."""
CLAIM = r"@claim-[0-9a-f]{8}"
"""What a claim is called, as a pattern."""
CLAIMS = "@claim"
"""As whom every claim is known to the broker: what it may write and read does not depend on which it is."""
RESERVED = ("fs-", "fd-")
"""How names of clients begin that fedge keeps for itself: servers that look for others, and the doctor's."""
_DOMAIN = "fedge-enrol/1"
"""What is signed for this purpose is good for no other."""
_USER = re.compile(rf"(?:{CLAIM}|{CLIENT})\Z")

ClientName = Annotated[str, Meta(pattern=rf"^{CLIENT}\Z")]
Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Ask(Struct, frozen=True, array_like=True):
    """A device wants a certificate for the name ``client``."""

    client: ClientName
    csr: Annotated[bytes, Meta(min_length=1, max_length=REQUEST_LIMIT)]
    """PKCS #10, in DER."""
    nonce: Nonce
    software: Annotated[str, Meta(pattern=r"^[ -~]{0,64}\Z")] = ""


class Told(Struct, frozen=True, array_like=True):
    """What became of an Ask; ``detail`` says why. The rest is there with a certificate only."""

    nonce: Nonce
    status: Literal["issued", "pending", "refused"]
    detail: Text = ""
    certificate: Annotated[bytes, Meta(max_length=CERTIFICATE_LIMIT)] = b""
    authority: Annotated[bytes, Meta(max_length=CERTIFICATE_LIMIT)] = b""
    """Both X.509, in DER."""
    pins: Annotated[tuple[Key, ...], Meta(max_length=8)] = ()
    """The federation's public keys that are to be believed from now on."""
    issued: Moment = 0.0


TABLE: dict[int, type[Struct]] = {101: Ask, 102: Told}
"""Numbers that no message of `edge_client.wire.messages` has."""
_NUMBERS = {kind: number for number, kind in TABLE.items()}
_DECODERS: dict[type[Struct], msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in TABLE.values()
}
_ENCODER = msgspec.msgpack.Encoder()
Kind = TypeVar("Kind", Ask, Told)


def seal(federation: str, user: str, message: Ask | Told, sign: Callable[[bytes], bytes]) -> bytes:
    """A message as it travels."""
    number, body = _NUMBERS[type(message)], _ENCODER.encode(message)
    return envelope.wrap(number, body, sign(_covered(federation, user, number, body)))


def unseal(federation: str, user: str, payload: bytes, kind: type[Kind]) -> tuple[Kind, bytes, bytes]:
    """A message of this kind, the bytes that its signature has to be over, and its signature, which is not checked.

    Raises:
        WireError: the payload is too long, or no such message, or one of its fields is out of bounds.
    """
    if len(payload) > LIMIT:
        raise WireError(f"message of {len(payload)} bytes about enrolment; at most {LIMIT} are accepted")
    wrapped = envelope.unwrap(payload)
    number = _NUMBERS[kind]
    if wrapped.number != number:
        raise WireError(f"message number {wrapped.number}; expected {number}, {kind.__name__}")
    try:
        message: Kind = _DECODERS[kind].decode(wrapped.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{kind.__name__}: {error}") from error
    return message, _covered(federation, user, number, bytes(wrapped.body)), wrapped.signature


def ask_topic(federation: str, user: str) -> str:
    """Where ``user`` asks; ``+`` for all of them."""
    return f"fedge/{federation}/enrol/{user}/ask"


def told_topic(federation: str, user: str) -> str:
    """Where ``user`` is told."""
    return f"fedge/{federation}/enrol/{user}/told"


def parse_ask(federation: str, topic: str) -> str:
    """The user who asks on ``topic``.

    Raises:
        WireError: it is not a topic of this federation on which one asks.
    """
    parts = topic.split("/")
    if len(parts) != 5 or topic != ask_topic(federation, parts[3]) or not _USER.match(parts[3]):
        raise WireError(f"topic {topic[:200]!r} is not one on which a device asks {federation!r} for a certificate")
    return parts[3]


def check_name(client: str) -> str | None:
    """Why no device can have this name; None where one can."""
    if not re.fullmatch(CLIENT, client):
        return "expected 1 to 64 letters, digits, dots, dashes or underscores, and no dot in the first place"
    if client.startswith(RESERVED):
        return f"names that begin with {' or '.join(RESERVED)} are fedge's own"
    return None


def _covered(federation: str, user: str, number: int, body: bytes) -> bytes:
    return _ENCODER.encode([_DOMAIN, federation, user, number, body])
