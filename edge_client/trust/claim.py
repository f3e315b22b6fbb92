"""A claim: one small file with which one device may enrol once. Whoever has it first may."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from msgspec import Meta, Struct

from edge_client.address import Address
from edge_client.errors import ConfigError, TransportError
from edge_client.tls import Tls
from edge_client.trust.certificate import Certificate
from edge_client.trust.keys import SigningKey, verify, write_secret
from edge_client.wire.enrolment import CLAIM, CLAIMS
from edge_client.wire.messages import FederationName

SUFFIX = ".fedgeclaim"
_LIMIT = 64 * 1024
_OTHERS = 0o077
_DOMAIN = "fedge-claim/1"
_ENCODER = msgspec.json.Encoder(order="deterministic")


_PLACE = ".fedge-enrolling-"
"""How the folders are called in which a claim's key is while a device enrols."""


class Claim(Struct, frozen=True, forbid_unknown_fields=True, repr_omit_defaults=True):
    """What the file holds: where to ask, as whom, and whom to believe."""

    format: Literal[1]
    broker: str
    federation: FederationName
    user: Annotated[str, Meta(pattern=rf"^{CLAIM}\Z")]
    expires: float
    """Seconds since 1970."""
    authority: str
    certificate: str
    key: str
    """In PEM; the key opens nothing but one enrolment."""
    pins: tuple[str, ...]
    """The federation's public keys, in hexadecimal digits."""
    signature: str = ""
    """The federation's, over all of the above: a file that was damaged or changed in part is noticed."""

    def __repr__(self) -> str:
        return f"Claim({self.user!r}, {self.federation!r})"

    def signed(self, sign: Callable[[bytes], bytes]) -> "Claim":
        """The claim with the federation's signature."""
        return msgspec.structs.replace(self, signature=sign(self._covered()).hex())

    @classmethod
    def load(cls, path: Path) -> "Claim":
        """Read a claim and check that its parts fit.

        Raises:
            ConfigError: it cannot be read, may be read by others, is damaged, or was changed.
        """
        try:
            status = os.stat(path)
            if status.st_mode & _OTHERS:
                raise ConfigError(
                    f"{path} may be read by others than its owner; expected mode 0600: chmod 600 {path} "
                    "(where the file system has no modes, copy it first: install -m 600)"
                )
            if status.st_size > _LIMIT:
                raise ConfigError(f"{path} has {status.st_size} bytes; expected a claim made by `fedge claim`")
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a claim") from error
        try:
            claim = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is no claim, or is damaged ({error}); make one with `fedge claim`") from error
        problem = claim._problem()
        if problem:
            raise ConfigError(f"{path}: {problem}; use the file as `fedge claim` made it, or make another one")
        return claim

    def save(self, path: Path) -> None:
        """Write it for its owner alone.

        Raises:
            ConfigError: the disk refuses.
        """
        write_secret(path, msgspec.json.format(_ENCODER.encode(self), indent=2) + b"\n")

    @property
    def address(self) -> Address:
        """Where the broker is."""
        return Address.parse(self.broker)

    @contextlib.contextmanager
    def tls(self, folder: Path) -> Iterator[Tls]:
        """Its certificate and key as files for a connection, in a folder that is made in ``folder`` and removed again.

        What a start that was killed has left there is removed too.

        Raises:
            ConfigError: the disk refuses.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in folder.glob(f"{_PLACE}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(prefix=_PLACE, dir=folder) as name:
                place = Path(name)
                for file, text in (
                    ("ca.crt", self.authority),
                    ("claim.crt", self.certificate),
                    ("claim.key", self.key),
                ):
                    write_secret(place / file, text.encode())
                yield Tls.of(place, "claim")
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be written ({error.strerror}); check disk and permissions") from error

    @property
    def signing_key(self) -> SigningKey:
        """The claim's key."""
        private = load_pem_private_key(self.key.encode(), password=None)
        assert isinstance(private, Ed25519PrivateKey)
        return SigningKey(private)

    @property
    def publics(self) -> tuple[bytes, ...]:
        """The federation's public keys."""
        return tuple(bytes.fromhex(pin) for pin in self.pins)

    def _covered(self) -> bytes:
        fields: dict[str, Any] = msgspec.structs.asdict(self)
        del fields["signature"]
        return _ENCODER.encode([_DOMAIN, fields])

    def _problem(self) -> str | None:
        try:
            if not any(verify(pin, self._covered(), bytes.fromhex(self.signature)) for pin in self.publics):
                return "it was changed, or is damaged: the federation's signature does not fit"
            private = load_pem_private_key(self.key.encode(), password=None)
            certificate = Certificate.parse(self.certificate.encode(), "the claim's certificate")
            authority = Certificate.parse(self.authority.encode(), "the authority's certificate")
            _ = self.address
        except (ValueError, TypeError, ConfigError, TransportError) as error:
            return f"it holds something that cannot be used ({error})"
        if not isinstance(private, Ed25519PrivateKey) or SigningKey(private).public != certificate.public:
            return "its key is not that of its certificate"
        if certificate.name != CLAIMS or not certificate.issued_by(authority):
            return "its certificate is another user's or another authority's"
        if certificate.federation != self.federation or authority.federation != self.federation:
            return f"it is of federation {certificate.federation!r}, and says {self.federation!r}"
        return None


def is_claim(user: str) -> bool:
    """Whether a user's name is that of a claim."""
    return re.fullmatch(CLAIM, user) is not None
