"""An authority folder as `fedge ca init` lays it out, made by hand: certificates for tests of brokers and of TLS."""

import datetime as dt
import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_client.trust.keys import write_secret

LONG_AGO, IN_A_YEAR = dt.datetime(2020, 1, 1), dt.datetime(2060, 1, 1)
HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass
class Certificates:
    """One authority; its folder has what a server and a broker need, ``device`` makes a folder for a device."""

    folder: Path
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    revoked: list[int] = field(default_factory=list)
    lists: int = 0

    def __post_init__(self) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority of {self.folder.name}")])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        own = self._builder(self.name, self.key).add_extension(constraints, critical=True)
        self.certificate = own.add_extension(_usage(authority=True), critical=True).sign(self.key, None)
        self._write(self.folder / "ca.crt", self.certificate)
        self.issue(self.folder, "broker", "broker", hosts=HOSTS)
        self.issue(self.folder, "server", "@server")
        self.issue(self.folder, "enrol", "@enrol")
        self.revoke()

    def device(self, name: str, *, until: dt.datetime = IN_A_YEAR, since: dt.datetime = LONG_AGO) -> Path:
        """The folder of an identity, with its own key."""
        folder = self.folder.parent / f"{self.folder.name}-{name}"
        self.issue(folder, "device", name, until=until, since=since)
        self._write(folder / "ca.crt", self.certificate)
        return folder

    def issue(
        self,
        folder: Path,
        file: str,
        name: str,
        *,
        hosts: tuple[str, ...] = (),
        until: dt.datetime = IN_A_YEAR,
        since: dt.datetime = LONG_AGO,
    ) -> None:
        """Write ``<file>.key`` and ``<file>.crt``."""
        key = Ed25519PrivateKey.generate()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        built = self._builder(subject, key, since, until).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        built = built.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        built = built.add_extension(_usage(authority=False), critical=True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        built = built.add_extension(issuer, critical=False)
        if hosts:
            built = built.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        write_secret(folder / f"{file}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self._write(folder / f"{file}.crt", built.sign(self.key, None))

    def revoke(self, *certificates: Path) -> None:
        """Add certificates to the revocation list."""
        self.revoked += [x509.load_pem_x509_certificate(path.read_bytes()).serial_number for path in certificates]
        self.lists += 1
        # A list replaces another one if it is newer, by whole seconds.
        issued = LONG_AGO + dt.timedelta(seconds=self.lists)
        built = x509.CertificateRevocationListBuilder().issuer_name(self.name)
        built = built.last_update(issued).next_update(IN_A_YEAR)
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(issued).build()
            built = built.add_revoked_certificate(entry)
        self._write(self.folder / "crl.pem", built.sign(self.key, None))

    def _builder(
        self,
        subject: x509.Name,
        key: Ed25519PrivateKey,
        since: dt.datetime = LONG_AGO,
        until: dt.datetime = IN_A_YEAR,
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(until)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    @staticmethod
    def _write(path: Path, document: x509.Certificate | x509.CertificateRevocationList) -> None:
        write_secret(path, document.public_bytes(Encoding.PEM))


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
