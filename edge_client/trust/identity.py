"""A device's identity: its key, its certificate, its federation's authority and public keys, in one folder.

The key is written before it is certified, and the certificate last of all: a power cut leaves an identity or none, and
a key that enrolment goes on with. A renewed certificate is for the same key, so each file may be replaced by itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from edge_client.errors import ConfigError
from edge_client.tls import Tls
from edge_client.trust.certificate import Certificate
from edge_client.trust.keys import SigningKey, read_publics, write_publics, write_secret

KEY, CERTIFICATE, AUTHORITY, PINS, ABOUT = "device.key", "device.crt", "ca.crt", "federation.pub", "identity.json"
_RENEWED = 2 / 3
"""Share of a certificate's life after which it is renewed."""


class _About(msgspec.Struct, frozen=True):
    """`identity.json`. All but ``issued`` is in the certificate too, which is what counts."""

    federation: str
    client: str
    serial: str
    issued: float
    expires: float


@dataclass(frozen=True)
class Identity:
    """Who a device is: ``client`` of ``federation``, from ``issued`` until ``expires``, in seconds since 1970."""

    folder: Path
    federation: str
    client: str
    serial: str
    issued: float
    expires: float

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether a folder holds an identity, be it whole or damaged."""
        return (folder / CERTIFICATE).exists()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read and check an identity.

        Raises:
            ConfigError: a file is missing or damaged, may be read by others, or does not fit the others.
        """
        certificate = Certificate.parse(_read(folder / CERTIFICATE), str(folder / CERTIFICATE))
        authority = Certificate.parse(_read(folder / AUTHORITY), str(folder / AUTHORITY))
        read_publics(folder / PINS)
        if SigningKey.load(folder / KEY).public != certificate.public:
            raise ConfigError(f"{folder / CERTIFICATE} is not for the key in {KEY}; {_ANEW}")
        if not certificate.issued_by(authority):
            raise ConfigError(f"{folder / CERTIFICATE} was not issued by the authority in {AUTHORITY}; {_ANEW}")
        try:
            about = msgspec.json.decode(_read(folder / ABOUT), type=_About)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{folder / ABOUT} is damaged ({error}); {_ANEW}") from error
        # After a power cut while a renewed certificate was stored, `issued` may be that of one which was not.
        return cls(
            folder, certificate.federation, certificate.name, certificate.serial, about.issued, certificate.expires
        )

    @property
    def key(self) -> SigningKey:
        """The device's private key, read anew."""
        return SigningKey.load(self.folder / KEY)

    @property
    def pins(self) -> tuple[bytes, ...]:
        """The public keys of the federation's servers."""
        return read_publics(self.folder / PINS)

    @property
    def tls(self) -> Tls:
        """How the device shows itself to the broker."""
        return Tls.of(self.folder)

    def due(self, now: float) -> bool:
        """Whether it is time to renew the certificate, at ``now`` in seconds since 1970."""
        return due(self.issued, self.expires, now)


def due(issued: float, expires: float, now: float) -> bool:
    """Whether a certificate is in the last third of its life."""
    return now >= issued + _RENEWED * (expires - issued)


def prepare(folder: Path, *, generate: Callable[[], SigningKey] = SigningKey.generate) -> SigningKey:
    """The key to be certified: made and stored, unless an earlier start has done so.

    Raises:
        ConfigError: it cannot be stored, or the one that is there cannot be used.
    """
    if (folder / KEY).exists():
        return SigningKey.load(folder / KEY)
    key = generate()
    key.save(folder / KEY)
    return key


def store(
    folder: Path, certificate: Certificate, authority: Certificate, pins: Iterable[bytes], issued: float
) -> Identity:
    """Store what a device was given for the key that is in ``folder`` already.

    Raises:
        ConfigError: the disk refuses.
    """
    about = _About(certificate.federation, certificate.name, certificate.serial, issued, certificate.expires)
    write_secret(folder / AUTHORITY, authority.pem)
    write_publics(folder / PINS, pins)
    write_secret(folder / ABOUT, msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n")
    write_secret(folder / CERTIFICATE, certificate.pem)
    return Identity.load(folder)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_ANEW}") from error


_ANEW = "remove the folder and enrol anew with `fedge enroll`"
