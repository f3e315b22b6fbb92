"""TLS to a broker: what is trusted, who one is, and in plain words why a handshake failed."""

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_client.errors import TransportError

_TIMES = "%Y-%m-%d %H:%M UTC"
_NOT_YET, _EXPIRED, _OTHER_HOST, _OTHER_ADDRESS = 9, 10, 62, 64
"""OpenSSL's codes (``X509_V_ERR_...``); all others that we have met mean that the chain ends nowhere."""
_STRANGER = "the broker shows a certificate of an authority that this device does not trust"

# What the other side says before it hangs up (RFC 8446, section 6): OpenSSL's name for it, and what it means here.
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the broker asks for a certificate and there is none to show",
    "TLSV1_ALERT_UNKNOWN_CA": "the broker refuses this certificate: it is of another authority",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the broker refuses this certificate: it is revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the broker refuses this certificate: it has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the broker refuses this certificate: none, of another authority, or revoked",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the broker refuses the handshake: no certificate, or none that it accepts",
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS; is it a port for mqtt:// instead?",
    "RECORD_LAYER_FAILURE": "what listens there does not speak TLS; is it a port for mqtt:// instead?",
}


@dataclass(frozen=True)
class Tls:
    """Files in PEM for connections by TLS; where ``ca`` is None, the system's authorities are trusted."""

    ca: Path | None = None
    """The authority that the broker's certificate must be of."""
    certificate: Path | None = None
    """Who one is; a broker with generated configuration lets in nobody without it."""
    key: Path | None = None
    """Its private key."""

    @classmethod
    def of(cls, folder: Path, name: str = "device") -> "Tls":
        """The files of an identity: ``ca.crt``, and ``<name>.crt`` with its key."""
        return cls(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key")

    @classmethod
    def found(cls, folder: Path) -> "Tls | None":
        """The identity in a folder, a device's or (of an authority) the server's; None where there is none."""
        names = (name for name in ("device", "server") if (folder / f"{name}.crt").exists())
        name = next(names, None)
        return None if name is None else cls.of(folder, name)

    def context(self) -> ssl.SSLContext:
        """What a connection is made with: TLS 1.2 or later, the broker's certificate and name checked.

        Raises:
            TransportError: a file cannot be used; or the certificate is not valid now, or the clock is wrong.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (OSError, ValueError) as error:
            raise TransportError(f"{self.ca}: {_why(error)}; expected the authority's certificate in PEM") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The default from Python 3.13 on (RFC 5280 to the letter): what is refused does not depend on the version.
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        # A device's name may be a host's; the names of brokers are alternative ones.
        context.hostname_checks_common_name = False
        if self.certificate is not None:
            _check_dates(self.certificate)
            try:
                context.load_cert_chain(self.certificate, self.key)
            except (OSError, ValueError) as error:
                raise TransportError(
                    f"{self.key or self.certificate}: {_why(error)}; expected the private key of {self.certificate}"
                ) from error
        return context


def explain(error: Exception) -> str:
    """Why a connection failed, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (_NOT_YET, _EXPIRED):
            state = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
            return f"the broker's certificate {state} by this device's clock ({_now():{_TIMES}}); is that right?"
        if error.verify_code in (_OTHER_HOST, _OTHER_ADDRESS):
            said = error.verify_message.rstrip(".").strip()
            return f"the broker's certificate is for other hosts ({said}); name it in `fedge ca init --host`"
        return f"{_STRANGER} ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and (meaning := _ALERTS.get(getattr(error, "reason", ""))):
        return meaning
    return _why(error)


def _check_dates(path: Path) -> None:
    """OpenSSL would show a certificate that is not valid, and only the broker would know why it refuses it.

    Raises:
        TransportError: it cannot be read, or is not valid now.
    """
    # Here, so that a connection without a certificate does not load it.
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TransportError(f"{path}: {_why(error)}; expected a certificate in PEM") from error
    now, since, until = _now(), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < since:
        raise TransportError(
            f"{path} is valid from {since:{_TIMES}} on, and this device's clock says {now:{_TIMES}}; set the clock"
        )
    if now > until:
        raise TransportError(
            f"{path} has expired on {until:{_TIMES}}, and this device's clock says {now:{_TIMES}}; "
            "set the clock if that is wrong, else enrol the device anew (fedge enroll)"
        )


def _now() -> datetime:
    return datetime.now(UTC)


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        # "[SSL: KEY_VALUES_MISMATCH] key values mismatch (_ssl.c:4158)": what is between is for people.
        text = str(error.strerror or error).split("] ", 1)[-1]
        return text.split(" (_ssl.c", 1)[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
