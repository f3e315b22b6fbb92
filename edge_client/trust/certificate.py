"""X.509 as far as fedge needs it (RFC 5280, RFC 8410): certificates of Ed25519 keys, and requests for them.

A certificate's subject is the user's name, and its issuer names the federation.
"""

from dataclasses import dataclass
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from edge_client.errors import ConfigError
from edge_client.trust.keys import SigningKey
from edge_client.wire.enrolment import CERTIFICATE_LIMIT, REQUEST_LIMIT

_WHOLE_BITS = b"\x03\x41\x00"
"""How DER begins a bit string of 64 bytes, an Ed25519 signature."""
_WRONG = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion)
"""What the library raises for bytes that are not what they should be."""
_PEM = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True)
class Certificate:
    """What a certificate says: ``name`` of ``federation`` owns the key ``public`` (32 bytes) until ``expires``.

    ``serial`` is in hexadecimal digits, ``expires`` in seconds since 1970. ``der`` is the certificate itself.
    """

    der: bytes
    federation: str
    name: str
    public: bytes
    serial: str
    expires: float

    @classmethod
    def parse(cls, data: bytes, what: str = "certificate") -> Self:
        """Read one in DER or PEM; ``what`` it is called in errors. Who issued it is not checked: see `issued_by`.

        Raises:
            ConfigError: it is none, or not one of an Ed25519 key with one name.
        """
        if len(data) > 2 * CERTIFICATE_LIMIT:
            raise ConfigError(f"{what} has {len(data)} bytes; expected at most {2 * CERTIFICATE_LIMIT}")
        try:
            found = (
                x509.load_pem_x509_certificate(data)
                if data.lstrip().startswith(_PEM)
                else x509.load_der_x509_certificate(data)
            )
            key = found.public_key()
            names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            issuers = found.issuer.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
            expires = found.not_valid_after_utc.timestamp()
        except _WRONG as error:
            raise ConfigError(f"{what} cannot be read ({error}); expected X.509 in PEM or DER") from error
        if not isinstance(key, Ed25519PublicKey) or len(names) != 1 or len(issuers) != 1:
            raise ConfigError(f"{what} is foreign; expected one of an Ed25519 key, made by `fedge ca`")
        return cls(
            found.public_bytes(Encoding.DER),
            str(issuers[0].value),
            str(names[0].value),
            key.public_bytes(Encoding.Raw, PublicFormat.Raw),
            f"{found.serial_number:x}",
            expires,
        )

    @property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return x509.load_der_x509_certificate(self.der).public_bytes(Encoding.PEM)

    def issued_by(self, authority: "Certificate") -> bool:
        """Whether ``authority`` is one, and has signed this certificate."""
        try:
            mine, theirs = (x509.load_der_x509_certificate(one.der) for one in (self, authority))
            basic = theirs.extensions.get_extension_for_class(x509.BasicConstraints).value
            mine.verify_directly_issued_by(theirs)
        except (*_WRONG, x509.ExtensionNotFound, x509.DuplicateExtension):
            return False
        return basic.ca


def make_request(key: SigningKey, client: str) -> bytes:
    """A request to certify that ``client`` owns ``key``: PKCS #10 (RFC 2986) in DER; the same bytes each time."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, client)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key.private, None).public_bytes(Encoding.DER)


def read_request(csr: bytes, client: str) -> bytes:
    """The public key, 32 bytes, that a request wants certified for ``client``; nothing else of it is looked at.

    Raises:
        ConfigError: it is no request, is not signed by the key in it, or is for another kind of key or another name.
    """
    if len(csr) > REQUEST_LIMIT:
        raise ConfigError(f"the certificate request has {len(csr)} bytes; expected at most {REQUEST_LIMIT}")
    try:
        found = x509.load_der_x509_csr(csr)
        key = found.public_key()
        names = [str(name.value) for name in found.subject]
        kinds = [name.oid for name in found.subject]
        signed = found.signature_algorithm_oid == SignatureAlgorithmOID.ED25519 and found.is_signature_valid
        # A bit string may also say that some of its last bits are none, and one request would have several forms.
        signed = signed and csr.endswith(_WHOLE_BITS + found.signature)
    except _WRONG as error:
        raise ConfigError("the certificate request cannot be read; expected PKCS #10 in DER") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError("the certificate request is for a key of another kind; expected Ed25519")
    if not signed:
        raise ConfigError("the certificate request is not signed by the key that it is for")
    if kinds != [NameOID.COMMON_NAME] or names != [client]:
        raise ConfigError(f"the certificate request is for the name {','.join(names)[:80]!r}; expected {client!r}")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
