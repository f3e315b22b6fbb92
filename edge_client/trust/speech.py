"""The voice of a device with a key: what it signs with, whom it believes, and what it remembers of that."""

from collections.abc import Sequence
from pathlib import Path

from edge_client.trust.keys import SigningKey, verify
from edge_client.trust.witness import Witness
from edge_client.wire.voice import SignedMember

WITNESS = "witness.msgpack"
"""The file in a device's state folder that holds what it remembers."""


def signed_member(
    federation: str, client: str, key: SigningKey, pins: Sequence[bytes], state: Path, wall: float
) -> tuple[SignedMember, Witness]:
    """A voice for one life of a device, and its memory of earlier ones in the folder ``state``.

    ``pins`` are the public keys of the federation's servers; ``wall`` is the time in seconds since 1970.

    Raises:
        StoreError: the memory cannot be read or written, or is damaged.
    """
    witness = Witness(state / WITNESS, wall)

    def believed(data: bytes, signature: bytes) -> bool:
        return any(verify(pin, data, signature) for pin in pins)

    return SignedMember(federation, client, witness.life, key.sign, believed, witness.newest), witness
