"""Keys: kept for their owner alone, and what they sign is believed exactly when nothing has changed."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_client.errors import ConfigError
from edge_client.trust.keys import SigningKey, read_publics, verify, write_publics, write_secret

KEY = SigningKey.generate()


def test_a_signature_holds_for_its_key_and_its_data_alone():
    signature = KEY.sign(b"data")
    assert len(KEY.public) == 32
    assert len(signature) == 64
    assert verify(KEY.public, b"data", signature)
    assert not verify(KEY.public, b"date", signature)
    assert not verify(SigningKey.generate().public, b"data", signature)
    assert not verify(KEY.public, b"data", bytes([signature[0] ^ 1]) + signature[1:])


@pytest.mark.parametrize(("public", "signature"), [(b"", bytes(64)), (bytes(31), bytes(64)), (bytes(32), b"")])
def test_what_is_no_key_or_no_signature_is_not_believed(public, signature):
    assert not verify(public, b"data", signature)


def test_a_key_is_saved_for_its_owner_alone_and_read_back(tmp_path):
    path = tmp_path / "keys" / "device.key"
    KEY.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert SigningKey.load(path).public == KEY.public
    assert [entry.name for entry in path.parent.iterdir()] == ["device.key"]


def test_a_secret_replaces_what_a_crash_left_whatever_its_mode(tmp_path):
    left = tmp_path / "secret.new"
    left.write_bytes(b"half")
    left.chmod(0o644)
    write_secret(tmp_path / "secret", b"whole")
    assert (tmp_path / "secret").read_bytes() == b"whole"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_a_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "device.key"
    KEY.save(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        SigningKey.load(path)


def test_what_is_no_key_is_refused(tmp_path):
    path = tmp_path / "device.key"
    with pytest.raises(ConfigError, match="cannot be read"):
        SigningKey.load(path)
    write_secret(path, b"rubbish")
    with pytest.raises(ConfigError, match="no private key"):
        SigningKey.load(path)
    other = ec.generate_private_key(ec.SECP256R1())
    write_secret(path, other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigError, match="another kind"):
        SigningKey.load(path)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        KEY.save(tmp_path / "file" / "device.key")


def test_public_keys_are_lines_of_hex(tmp_path):
    path, keys = tmp_path / "federation.pub", (KEY.public, SigningKey.generate().public)
    write_publics(path, keys)
    assert read_publics(path) == keys
    for wrong in ("", "zz", KEY.public.hex()[:-2], "ä"):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match="hex digits"):
            read_publics(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_publics(tmp_path / "none")


def test_a_key_does_not_show_itself():
    assert "private" not in repr(KEY).lower()
