"""Signatures for tests of the state machines: a keyed hash, as good as any for whoever does not know the key."""

import hashlib

from edge_client.wire.envelope import Stamp
from edge_client.wire.voice import SignedHost, SignedMember

FEDERATION = b"key of the federation"


def mac(key: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=key[:64], digest_size=64).digest()


def key_of(client: str) -> bytes:
    return f"key of {client}".encode()


def member(
    federation: str,
    client: str,
    life: int = 1,
    *,
    key: bytes | None = None,
    believes: bytes = FEDERATION,
    newest: Stamp | None = None,
    passed: float = 0.0,
) -> SignedMember:
    """The voice of one life of a client."""
    return SignedMember(
        federation,
        client,
        life,
        lambda data: mac(key or key_of(client), data),
        lambda data, signature: mac(believes, data) == signature,
        newest or Stamp(0, 0, 0),
        passed,
    )


def host(
    federation: str,
    epoch: int,
    *,
    key: bytes = FEDERATION,
    revoked: frozenset[str] | set[str] = frozenset(),
    keys: dict[str, bytes] | None = None,
):
    """The voice of a server, for which every name is enrolled that is not ``revoked``; ``keys`` are other ones."""
    others = {} if keys is None else keys
    return SignedHost(
        federation,
        epoch,
        lambda data: mac(key, data),
        lambda client: None if client in revoked else others.get(client, key_of(client)),
        lambda public, data, signature: mac(public, data) == signature,
        lambda data, signature: mac(FEDERATION, data) == signature,
    )
