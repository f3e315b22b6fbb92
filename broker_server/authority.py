"""A federation's authority: makes certificates of users of the broker, claims, and the list of what is revoked.

X.509 (RFC 5280) with Ed25519 keys only (RFC 8410). Certificates are valid from the past on: a device may have no clock.
"""

import contextlib
import fcntl
import ipaddress
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker_server.broker_config.spec import ENROLMENT, SERVER
from broker_server.registry import Registry
from edge_client.errors import ConfigError
from edge_client.trust.certificate import Certificate, read_request
from edge_client.trust.claim import Claim
from edge_client.trust.keys import SigningKey, read_publics, write_publics, write_secret
from edge_client.wire.enrolment import CLAIMS, check_name

CA_KEY, CA, REVOKED, REGISTRY = "ca.key", "ca.crt", "crl.pem", "registry.db"
SIGNING, PINS = "federation.key", "federation.pub"
_SINCE = datetime(2020, 1, 1, tzinfo=UTC)
_YEARS = 20
_DAY = 86_400.0
_OWN_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """What is in an authority's folder. ``key`` may have been moved away: then nothing can be certified."""

    folder: Path
    federation: str
    certificate: Certificate
    signing: SigningKey
    pins: tuple[bytes, ...]
    key: SigningKey | None

    @classmethod
    def init(cls, folder: Path, federation: str, hosts: Sequence[str], *, now: float) -> Self:
        """Make an authority for a broker that is called ``hosts``; ``now`` is in seconds since 1970.

        Raises:
            ConfigError: there is one in the folder, it cannot be written, or a host's name is none.
        """
        if (folder / CA).exists():
            raise ConfigError(f"{folder} holds an authority already; name another folder with -o")
        names = _hosts(hosts)
        # The certificate comes last: a folder without it holds nothing yet, and is made anew.
        key, signing = SigningKey.generate(), SigningKey.generate()
        subject = _name(f"fedge {secrets.token_hex(4)}", federation)
        expires = _later(now, _YEARS * 365.25)
        builder = _builder(subject, subject, Ed25519PublicKey.from_public_bytes(key.public), expires)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(certificates=True), critical=True)
        own = builder.sign(key.private, None)
        authority = cls(folder, federation, Certificate.parse(own.public_bytes(Encoding.DER)), signing, (), key)
        key.save(folder / CA_KEY)
        signing.save(folder / SIGNING)
        write_publics(folder / PINS, (signing.public,))
        for name, user in (("server", SERVER), ("enrol", ENROLMENT)):
            authority._equip(name, _name(user), ExtendedKeyUsageOID.CLIENT_AUTH)
        authority._equip_broker(names)
        authority.write_crl((), now=now)
        Registry.create(folder / REGISTRY).close()
        write_secret(folder / CA, authority.certificate.pem)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read an authority; that its ``ca.key`` is not there is no mistake.

        Raises:
            ConfigError: there is none in the folder, or one of its files cannot be used.
        """
        try:
            data = (folder / CA).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{folder / CA}: cannot be read ({error.strerror}); make an authority with `fedge ca init`, or name "
                "the folder of one"
            ) from error
        certificate = Certificate.parse(data, str(folder / CA))
        key = SigningKey.load(folder / CA_KEY) if (folder / CA_KEY).exists() else None
        if key is not None and key.public != certificate.public:
            raise ConfigError(f"{folder / CA_KEY} is not the key of {CA}; expected the one that was made with it")
        signing, pins = SigningKey.load(folder / SIGNING), read_publics(folder / PINS)
        if signing.public not in pins:
            raise ConfigError(f"{folder / PINS} does not list the key in {SIGNING}; nobody would believe it")
        return cls(folder, certificate.federation, certificate, signing, pins, key)

    @property
    def host(self) -> str:
        """What the broker is called first of all, as its certificate says."""
        return self.hosts[0]

    @property
    def hosts(self) -> tuple[str, ...]:
        """All that the broker is called, as its certificate says.

        Raises:
            ConfigError: there is none, or it cannot be used.
        """
        try:
            found = x509.load_pem_x509_certificate((self.folder / "broker.crt").read_bytes())
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise ConfigError(f"{self.folder / 'broker.crt'} cannot be used ({error}); name the broker") from error
        return tuple(str(name.value) for name in names)

    def unfit(self, client: str) -> str | None:
        """Why no device of this federation can have this name; None where one can."""
        if client.lower() in (host.lower() for host in self.hosts):
            return "the broker is called so, and a device could pass for it"
        return check_name(client)

    def rename_broker(self, hosts: Sequence[str]) -> None:
        """Certify the broker, with a new key, as what it is called now.

        Raises:
            ConfigError: a host's name is none, or the authority's key is not there.
        """
        self._equip_broker(_hosts(hosts))

    def issue(self, csr: bytes, client: str, days: float, *, now: float) -> Certificate:
        """Certify the key in a request as that of ``client``, from long ago until ``days`` after ``now``.

        Raises:
            ConfigError: no device can have that name, the request is malformed, oversized, for another name or kind of
                key, or not signed by its key; or the authority's key is not there.
        """
        if (problem := self.unfit(client)) is not None:
            raise ConfigError(f"{client!r} cannot be a device's name: {problem}")
        public = Ed25519PublicKey.from_public_bytes(read_request(csr, client))
        return self._certify(_name(client), public, ExtendedKeyUsageOID.CLIENT_AUTH, _later(now, days))

    def claims(self, count: int, seconds: float, url: str, *, now: float) -> list[tuple[Claim, Certificate]]:
        """Claims that hold until ``seconds`` after ``now``, for devices that reach the broker by ``url``.

        Raises:
            ConfigError: the authority's key is not there.
        """
        made: dict[str, tuple[Claim, Certificate]] = {}
        while len(made) < count:
            user = f"@claim-{secrets.token_hex(4)}"
            key = SigningKey.generate()
            public = key.private.public_key()
            expires = _later(now, seconds / _DAY)
            certificate = self._certify(_name(CLAIMS), public, ExtendedKeyUsageOID.CLIENT_AUTH, expires)
            private = key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            claim = Claim(
                format=1,
                broker=url,
                federation=self.federation,
                user=user,
                expires=certificate.expires,
                authority=self.certificate.pem.decode(),
                certificate=certificate.pem.decode(),
                key=private.decode(),
                pins=tuple(pin.hex() for pin in self.pins),
            )
            made[user] = claim.signed(self.signing.sign), certificate
        return list(made.values())

    def write_crl(self, revoked: Iterable[tuple[str, float]], *, now: float) -> Path:
        """Write the list of revoked certificates, by serial and time; it never expires, so that no broker stops.

        Raises:
            ConfigError: the authority's key is not there, or the disk refuses.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.load_der_x509_certificate(self.certificate.der).subject)
            .last_update(_SINCE)
            .next_update(datetime.fromtimestamp(self.certificate.expires, UTC))
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, when in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
            builder = builder.add_revoked_certificate(
                entry.revocation_date(datetime.fromtimestamp(int(when), UTC)).build()
            )
        path = self.folder / REVOKED
        write_secret(path, builder.sign(self._private.private, None).public_bytes(Encoding.PEM))
        return path

    @property
    def _private(self) -> SigningKey:
        if self.key is None:
            raise ConfigError(f"{self.folder / CA_KEY} is not there; put it back to certify or revoke anything")
        return self.key

    def _equip_broker(self, names: list[x509.GeneralName]) -> None:
        subject = _name(str(names[0].value)[:64])
        self._equip("broker", subject, ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName(names))

    def _equip(
        self, name: str, subject: x509.Name, purpose: x509.ObjectIdentifier, *extensions: x509.ExtensionType
    ) -> None:
        """Certify a new key for as long as the authority lives."""
        key, expires = SigningKey.generate(), datetime.fromtimestamp(self.certificate.expires, UTC)
        certificate = self._certify(subject, key.private.public_key(), purpose, expires, *extensions)
        key.save(self.folder / f"{name}.key")
        write_secret(self.folder / f"{name}.crt", certificate.pem)

    def _certify(
        self,
        subject: x509.Name,
        public: Ed25519PublicKey,
        purpose: x509.ObjectIdentifier,
        expires: datetime,
        *extensions: x509.ExtensionType,
    ) -> Certificate:
        own = x509.load_der_x509_certificate(self.certificate.der)
        builder = _builder(subject, own.subject, public, expires)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._private.private.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        for extension in (issuer, *extensions):
            builder = builder.add_extension(extension, critical=False)
        return Certificate.parse(builder.sign(self._private.private, None).public_bytes(Encoding.DER))


@contextlib.contextmanager
def telling_brokers(folder: Path) -> Iterator[None]:
    """The right to write the folders of brokers anew: a command and the server would do so at the same time.

    Raises:
        ConfigError: the authority's folder cannot be written to.
    """
    try:
        lock = os.open(folder / "brokers.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); check disk and permissions") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Ed25519PublicKey, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_SINCE)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str, organization: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _hosts(names: Sequence[str]) -> list[x509.GeneralName]:
    return [_host(name) for name in dict.fromkeys((*names, *_OWN_HOSTS))]


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name.encode("idna").decode())
    except ValueError as error:
        raise ConfigError(f"--host {name!r} is no host's name or address ({error})") from error


def _later(now: float, days: float) -> datetime:
    return datetime.fromtimestamp(int(now + days * _DAY), UTC)
