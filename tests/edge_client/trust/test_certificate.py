"""Requests and certificates: only what fedge made is taken, whatever else X.509 allows."""

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.errors import ConfigError
from edge_client.trust.certificate import Certificate, make_request, read_request
from edge_client.trust.keys import SigningKey

KEY = SigningKey.generate()
REQUEST = make_request(KEY, "pi-7")


def name(*parts):
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def request(subject, key=KEY.private, algorithm=None, extension=None):
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def test_a_request_is_the_same_each_time_and_gives_its_key():
    assert make_request(KEY, "pi-7") == REQUEST
    assert read_request(REQUEST, "pi-7") == KEY.public


def test_nothing_but_the_key_is_taken_from_a_request():
    wish = request(name((NameOID.COMMON_NAME, "pi-7")), extension=x509.BasicConstraints(ca=True, path_length=None))
    assert read_request(wish, "pi-7") == KEY.public


COMMON = (NameOID.COMMON_NAME, "pi-7")
BAD = {
    "another name": (make_request(KEY, "pi-8"), "'pi-8'; expected 'pi-7'"),
    "the server's name": (make_request(KEY, "@server"), "'@server'; expected 'pi-7'"),
    "no name": (request(name()), "expected 'pi-7'"),
    "two names": (request(name(COMMON, (NameOID.COMMON_NAME, "@server"))), "'pi-7,@server'"),
    "more than a name": (request(name(COMMON, (NameOID.ORGANIZATION_NAME, "x"))), "'pi-7,x'"),
    "a name of another kind": (request(name((NameOID.ORGANIZATION_NAME, "pi-7"))), "expected 'pi-7'"),
    "another kind of key": (
        request(name(COMMON), ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()),
        "another kind",
    ),
    "another's key": (
        REQUEST.replace(KEY.public, SigningKey.generate().public),
        "not signed by the key",
    ),
    "cut": (REQUEST[:-1], "cannot be read"),
    "longer": (REQUEST + b"\0", "cannot be read"),
    "empty": (b"", "cannot be read"),
    "too long": (bytes(2049), "at most 2048"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_is_not_what_it_should_be_is_refused_with_the_reason(case):
    data, words = BAD[case]
    with pytest.raises(ConfigError) as refused:
        read_request(data, "pi-7")
    assert words in str(refused.value)


@settings(max_examples=300)
@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_a_request_in_which_one_byte_was_changed_is_refused(position, change):
    changed = bytearray(REQUEST)
    changed[position] ^= change
    with pytest.raises(ConfigError):
        read_request(bytes(changed), "pi-7")


def test_a_request_has_one_form():
    """The byte before the signature says how many of its last bits do not count; where they are 0, it may lie."""
    while True:
        even = make_request(SigningKey.generate(), "pi-7")
        if even[-1] % 2 == 0:
            break
    with pytest.raises(ConfigError, match="is not signed"):
        read_request(even[:-65] + b"\x01" + even[-64:], "pi-7")


@settings(max_examples=300)
@given(st.binary(max_size=400), st.integers(0, len(REQUEST)), st.integers(0, len(REQUEST)))
def test_no_bytes_make_reading_do_more_than_refuse(noise, start, length):
    for data in (noise, REQUEST[:start] + noise + REQUEST[start + length :]):
        if data != REQUEST:
            with pytest.raises(ConfigError):
                read_request(data, "pi-7")
        with pytest.raises(ConfigError):
            Certificate.parse(data)


def certificate(subject, issuer, key, signer, *, ca=False):
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.private.public_key())
        .serial_number(77)
        .not_valid_before(dt.datetime(2020, 1, 1))
        .not_valid_after(dt.datetime(2030, 1, 1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return builder.sign(signer.private, None).public_bytes(Encoding.DER)


AUTHORITY = name((NameOID.COMMON_NAME, "authority"), (NameOID.ORGANIZATION_NAME, "toys"))
CA_KEY = SigningKey.generate()
CA = Certificate.parse(certificate(AUTHORITY, AUTHORITY, CA_KEY, CA_KEY, ca=True))


def test_a_certificate_says_who_owns_what_until_when():
    found = Certificate.parse(certificate(name(COMMON), AUTHORITY, KEY, CA_KEY))
    assert (found.federation, found.name, found.public, found.serial) == ("toys", "pi-7", KEY.public, "4d")
    assert found.expires == dt.datetime(2030, 1, 1, tzinfo=dt.UTC).timestamp()
    assert found.issued_by(CA)
    assert Certificate.parse(found.pem) == found


def test_a_certificate_that_the_authority_has_not_signed_is_not_its():
    other = SigningKey.generate()
    assert not Certificate.parse(certificate(name(COMMON), AUTHORITY, KEY, other)).issued_by(CA)
    # A device cannot be an authority: what it signs is nobody's.
    device = Certificate.parse(certificate(AUTHORITY, AUTHORITY, other, CA_KEY))
    assert not Certificate.parse(certificate(name(COMMON), AUTHORITY, KEY, other)).issued_by(device)


def test_a_certificate_without_a_federation_or_of_another_key_is_foreign():
    nobody = name((NameOID.COMMON_NAME, "x"))
    with pytest.raises(ConfigError, match="foreign"):
        Certificate.parse(certificate(name(COMMON), nobody, KEY, CA_KEY))
    with pytest.raises(ConfigError, match="at most"):
        Certificate.parse(bytes(10_000))
