"""Ed25519 keys (RFC 8032): made, kept in files that only their owner reads, and used to sign and to verify."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edge_client.errors import ConfigError

PUBLIC_BYTES = 32
_OTHERS = 0o077


@dataclass(frozen=True, eq=False, repr=False)
class SigningKey:
    """A private key; its bytes never appear in a message or a log line."""

    private: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Self:
        """A new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a key in PEM (PKCS #8, not encrypted).

        Raises:
            ConfigError: it cannot be read, is no Ed25519 key, or may be read by others.
        """
        try:
            if os.stat(path).st_mode & _OTHERS:
                raise ConfigError(f"{path} may be read by others than its owner; expected mode 0600: chmod 600 {path}")
            private = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a private key") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path} holds no private key that is not encrypted; expected Ed25519 in PEM") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a key of another kind; expected Ed25519")
        return cls(private)

    def save(self, path: Path) -> None:
        """Write the key for its owner alone (`write_secret`)."""
        write_secret(path, self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, data: bytes) -> bytes:
        """The signature of ``data``, 64 bytes."""
        return self.private.sign(data)


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of ``data`` by the owner of ``public``."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def write_secret(path: Path, data: bytes) -> None:
    """Replace a file in one step, on the medium when this returns, mode 0600 from its first byte on.

    Its folder is made, for the owner alone, where it is missing.

    Raises:
        ConfigError: the disk refuses.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What an earlier crash left may have another mode.
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); check disk and permissions") from error


def read_publics(path: Path) -> tuple[bytes, ...]:
    """The public keys in a file of lines of hexadecimal digits; the first one signs, all are believed.

    Raises:
        ConfigError: it cannot be read, or holds anything else, or nothing.
    """
    try:
        lines = path.read_text(encoding="ascii").split()
        keys = tuple(bytes.fromhex(line) for line in lines)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected the federation's public key") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds something else than public keys; expected lines of 64 hex digits") from error
    if not keys or any(len(key) != PUBLIC_BYTES for key in keys):
        raise ConfigError(f"{path} holds no public key, or one that is cut; expected lines of 64 hex digits")
    return keys


def write_publics(path: Path, keys: Iterable[bytes]) -> None:
    """Write public keys as `read_publics` reads them.

    Raises:
        ConfigError: the disk refuses.
    """
    write_secret(path, "".join(f"{key.hex()}\n" for key in keys).encode())
