"""What every message is wrapped in, and what a signature covers.

On the wire a message is the MessagePack array ``[protocol, number, body, signature]``, and where the federation signs
what it says ``[protocol, number, body, signature, [epoch, life, count]]``. ``number`` is the message's place in the
table (`edge_client.wire.messages`), ``body`` its struct as an array. An unsigned message has an empty signature.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge_client.errors import WireError

PROTOCOL = 1
MESSAGE_LIMIT = 128 * 1024
"""Bytes of the largest message; anything longer is dropped unread."""
SIGNATURE = 64
"""Bytes of a signature (Ed25519)."""
SERVER, EVERYONE = "@server", "*"
"""Sender and recipient that are no client; no client can be called so."""
_DOMAIN = "fedge/1"
"""What is signed for this purpose is good for no other."""

Natural = Annotated[int, Meta(ge=0, le=2**48)]


class Stamp(Struct, frozen=True, array_like=True, order=True):
    """When a signed message was said, so that it cannot be said again; later ones compare greater.

    ``epoch`` is the server's, ``life`` counts the starts of the device that sends or receives (0 in what is for all),
    ``count`` what the sender has said within these two.
    """

    epoch: Natural
    life: Natural
    count: Natural


class Envelope(Struct, frozen=True, array_like=True):
    """A message that is not decoded yet."""

    protocol: int
    number: int
    body: msgspec.Raw
    signature: Annotated[bytes, Meta(max_length=SIGNATURE)] = b""
    stamp: Stamp | None = None


_DECODER = msgspec.msgpack.Decoder(Envelope)
_ENCODER = msgspec.msgpack.Encoder()


def wrap(number: int, body: bytes, signature: bytes = b"", stamp: Stamp | None = None) -> bytes:
    """A message as it travels."""
    plain = [PROTOCOL, number, msgspec.Raw(body), signature]
    return _ENCODER.encode(plain if stamp is None else [*plain, stamp])


def unwrap(payload: bytes) -> Envelope:
    """What a payload holds; its body is neither decoded nor believed.

    Raises:
        WireError: it is too long, is no message, or is of another protocol.
    """
    if len(payload) > MESSAGE_LIMIT:
        raise WireError(f"message of {len(payload)} bytes; at most {MESSAGE_LIMIT} are accepted")
    try:
        envelope = _DECODER.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a fedge message: {error}") from error
    if envelope.protocol != PROTOCOL:
        raise WireError(f"message of protocol {envelope.protocol}; this side speaks {PROTOCOL}")
    return envelope


def covered(federation: str, sender: str, recipient: str, number: int, stamp: Stamp, body: bytes) -> bytes:
    """The bytes that a signature is over: who says what to whom, where, and when. The task is in the body."""
    return _ENCODER.encode([_DOMAIN, federation, sender, recipient, number, stamp.epoch, stamp.life, stamp.count, body])
