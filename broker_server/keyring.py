"""What a server signs with and whom it believes: the federation's key, and those of the devices that are enrolled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from broker_server.authority import REGISTRY, Authority
from broker_server.registry import Registry
from edge_client.errors import ConfigError
from edge_client.trust.keys import SigningKey, verify
from edge_client.wire.voice import SignedHost, SignedMember

SERVERS = "fs-"
"""What names of servers begin with that look whether another one lives; no device is enrolled under such a name."""
_STALE = 300.0
"""Seconds after which devices are read again although none has changed: certificates expire."""


class Devices(Protocol):
    """Where enrolled devices are kept (`broker_server.registry`)."""

    def revision(self) -> int:
        """A number that is another one whenever something has changed; cheap to ask for."""

    def keys(self, now: float) -> Mapping[str, bytes]:
        """By client, the public keys of devices that are neither revoked nor expired at ``now``, seconds since 1970."""


@dataclass
class Keyring:
    """``signing`` is the federation's key; ``pins`` are the public keys that its servers sign with.

    There are several while keys are rotated.
    """

    signing: SigningKey
    pins: tuple[bytes, ...]
    devices: Devices
    _keys: Mapping[str, bytes] = field(init=False, default_factory=dict)
    _revision: int | None = field(init=False, default=None)
    _read: float = field(init=False, default=0.0)

    def key(self, client: str) -> bytes | None:
        """A client's public key; None where it is not enrolled."""
        return self.signing.public if client.startswith(SERVERS) else self._keys.get(client)

    def refresh(self, now: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Look what has changed by ``now``: clients that have a key or another key now, and those that have none."""
        revision = self.devices.revision()
        if revision == self._revision and 0 <= now - self._read < _STALE:
            return (), ()
        before, self._keys = self._keys, dict(self.devices.keys(now))
        self._revision, self._read = revision, now
        given = tuple(client for client, key in self._keys.items() if before.get(client) != key)
        return given, tuple(client for client in before if client not in self._keys)

    def host(self, federation: str, epoch: int) -> SignedHost:
        """The voice of a server in one epoch."""
        return SignedHost(federation, epoch, self.signing.sign, self.key, verify, self.believed)

    def member(self, federation: str, name: str) -> SignedMember:
        """The voice of a server that speaks as a client to another one; ``name`` begins with `SERVERS`."""
        return SignedMember(federation, name, 1, self.signing.sign, self.believed)

    def believed(self, data: bytes, signature: bytes) -> bool:
        """Whether a server of this federation has signed ``data``."""
        return any(verify(pin, data, signature) for pin in self.pins)


@contextmanager
def authority_keyring(folder: Path, federation: str) -> Iterator[Keyring]:
    """The keys in an authority's folder; for one thread.

    Raises:
        ConfigError: there is no authority of this federation in it, or it cannot be used.
        LedgerError: its registry cannot be read.
    """
    authority = Authority.load(folder)
    if authority.federation != federation:
        raise ConfigError(
            f"{folder} is the authority of federation {authority.federation!r}; expected {federation!r}: set "
            "trust.authority to the folder of this one, or make it with `fedge ca init`"
        )
    with Registry.open(folder / REGISTRY) as registry:
        yield Keyring(authority.signing, authority.pins, registry)
