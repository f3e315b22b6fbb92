"""The voice of a device with a key: what it signs with, whom it believes, and what it remembers of that."""

from collections.abc import Callable, Iterable
from pathlib import Path

from edge_client.store import WITNESS
from edge_client.trust.identity import PINS, Identity
from edge_client.trust.keys import SigningKey, verify
from edge_client.trust.witness import Witness
from edge_client.wire.envelope import Stamp
from edge_client.wire.voice import SignedMember


def signed_member(
    federation: str,
    client: str,
    key: SigningKey,
    pins: Callable[[], Iterable[bytes]],
    state: Path,
    wall: float,
    issued: float = 0.0,
) -> tuple[SignedMember, Witness]:
    """A voice for one life of a device, and its memory of earlier ones in the folder ``state``.

    ``pins`` gives the public keys of the federation's servers: others, once a renewed certificate came with them;
    ``wall`` is the time in seconds since 1970, and ``issued`` one that certainly has passed.

    Raises:
        StoreError: the memory cannot be read or written, or is damaged.
    """
    witness = Witness(state / WITNESS, wall)

    def believed(data: bytes, signature: bytes) -> bool:
        return any(verify(pin, data, signature) for pin in pins())

    passed = max(issued, witness.issued)
    return SignedMember(federation, client, witness.life, key.sign, believed, witness.newest, passed), witness


def identity_voice(identity: Identity, state: Path, wall: float) -> tuple[SignedMember, Callable[[Stamp, float], None]]:
    """The voice of an enrolled device with its state in a folder, and what is to be told of each newest offer.

    Raises:
        ConfigError: a file of the identity cannot be read.
        StoreError: the memory cannot be read or written, or is damaged.
    """
    pins = _Pins(identity)
    names = identity.federation, identity.client
    voice, witness = signed_member(*names, identity.key, pins.now, state, wall, identity.issued)
    return voice, witness.remember


class _Pins:
    """An identity's pins, read again when their file is another one."""

    def __init__(self, identity: Identity) -> None:
        self._identity, self._known, self._seen = identity, identity.pins, self._stamp(identity)

    def now(self) -> tuple[bytes, ...]:
        stamp = self._stamp(self._identity)
        if stamp != self._seen:
            self._known, self._seen = self._identity.pins, stamp
        return self._known

    @staticmethod
    def _stamp(identity: Identity) -> tuple[int, int]:
        found = (identity.folder / PINS).stat()
        return found.st_ino, found.st_mtime_ns
