"""Attacks on enrolment: a real `fedge serve`, and people who have found a claim."""

import asyncio
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from broker_server.authority import Authority
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import ConfigError
from edge_client.tls import explain
from edge_client.trust.certificate import make_request
from edge_client.trust.claim import Claim
from edge_client.trust.enrol import enroll
from edge_client.trust.keys import SigningKey
from edge_client.wire import enrolment as wire
from tests.attacks.outcome import Outcome
from tests.federation import NAME, PATIENCE, Serving, claims
from tests.flood import connection

WHERE = "server: enrolment"


def used_twice(authority: Authority, url: str, folder: Path) -> Outcome:
    """Enrol a second device with a claim that has enrolled one."""
    (claim,) = claims(authority, url)
    asyncio.run(enroll(claim, "pi-1", folder / "first", lambda _: None, patience=PATIENCE))
    try:
        asyncio.run(enroll(claim, "pi-2", folder / "second", lambda _: None, patience=PATIENCE))
    except ConfigError as error:
        return Outcome("a claim that is used twice", True, WHERE, str(error))
    return Outcome("a claim that is used twice", False, WHERE, "a second device was enrolled")


def expired(authority: Authority, url: str, folder: Path) -> Outcome:
    """Connect with a claim whose time is over."""
    (claim,) = claims(authority, url, seconds=-5.0)
    attack, where = "a claim after its time", "broker: mosquitto"
    with claim.tls(folder) as tls:
        # A device of fedge would look at its own certificate, and not even try.
        context = ssl.create_default_context(cafile=tls.ca)
        context.load_cert_chain(str(tls.certificate), tls.key)
    said = ""
    for _ in range(5):
        try:
            with connection(context, Address.parse(url).port):
                return Outcome(attack, False, where, "it was let in")
        except ssl.SSLError as error:
            said = f"{explain(error)} ({error})"
            # Where the broker hangs up before its reason was read, that is lost.
            if not isinstance(error, ssl.SSLEOFError):
                break
    return Outcome(attack, True, where, said)


def malformed(authority: Authority, url: str, folder: Path, server: Serving) -> list[Outcome]:
    """Ask for certificates with what is no request, or one that claims too much."""
    (claim,) = claims(authority, url)
    found = []
    with claim.tls(folder) as tls, Peer(Address.parse(url), "malformed", tls=tls) as peer:
        told = wire.told_topic(NAME, claim.user)
        peer.subscribe([told])
        for what, payload in _asks(claim).items():
            server.drain()
            peer.publish(wire.ask_topic(NAME, claim.user), payload)
            line = server.heard(claim.user, 30.0) or ""
            refused = bool(line) and "enrolled" not in line
            found.append(Outcome(f"a malformed certificate request: {what}", refused, WHERE, line or "silence"))
    return found


def _asks(claim: Claim) -> dict[str, bytes]:
    key = SigningKey.generate()

    def asked(csr: bytes, client: str = "pi-9") -> bytes:
        return wire.seal(NAME, claim.user, wire.Ask(client, csr, bytes(range(16)), "x"), claim.signing_key.sign)

    good = make_request(key, "pi-9")
    elliptic = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi-9")])
    other = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(elliptic, hashes.SHA256())
    return {
        "bytes that are no message": b"\xff" * 500,
        "cut in the middle": asked(good)[:-70],
        "no request in it": asked(b"0\x82" + bytes(300)),
        "a request of 2049 bytes": asked(bytes(2049)),
        "in another's name": asked(make_request(key, "pi-1")),
        "another self-signature": asked(good[:-8] + bytes(8)),
        "another kind of key": asked(other.public_bytes(Encoding.DER)),
        "the server's name": asked(make_request(key, "@server"), "@server"),
        "not signed by the claim": wire.seal(
            NAME, claim.user, wire.Ask("pi-9", good, bytes(16), "x"), SigningKey.generate().sign
        ),
    }
