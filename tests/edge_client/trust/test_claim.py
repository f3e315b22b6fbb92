"""A claim's parts fit, and nobody else may read it: one that was changed is refused, whatever was changed."""

import json
import shutil
import stat

import msgspec
import pytest

from edge_client.errors import ConfigError
from edge_client.trust.claim import Claim, is_claim
from edge_client.trust.keys import SigningKey, write_secret
from tests.office import NOW, URL, WEEK, Office


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office") / "authority")


@pytest.fixture
def path(office, tmp_path):
    office.claim().save(tmp_path / "claim.fedgeclaim")
    return tmp_path / "claim.fedgeclaim"


def test_a_claim_is_read_back_as_it_was_made(office, tmp_path):
    claim = office.claim()
    claim.save(tmp_path / "claim")
    found = Claim.load(tmp_path / "claim")
    assert found == claim
    assert is_claim(found.user)
    assert str(found.address) == URL
    assert (found.federation, found.expires) == ("toys", NOW + WEEK)
    assert found.publics == office.authority.pins
    assert stat.S_IMODE((tmp_path / "claim").stat().st_mode) == 0o600


def test_a_claim_does_not_show_its_key(office):
    claim = office.claim()
    assert "PRIVATE" not in repr(claim)
    assert "PRIVATE" not in f"{claim}"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o755])
def test_a_claim_that_others_may_read_is_refused(path, mode):
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Claim.load(path)


CHANGES = {
    "broker": "mqtt://elsewhere:1883",
    "federation": "others",
    "user": "@claim-00000000",
    "expires": 4e9,
    "pins": [SigningKey.generate().public.hex()],
}


@pytest.mark.parametrize("name", [*CHANGES, "authority", "certificate", "key"])
def test_a_claim_in_which_anything_was_changed_is_refused(office, path, tmp_path, name):
    claim = json.loads(path.read_text())
    other = Office(tmp_path / "other", number=1).claim()
    claim[name] = CHANGES.get(name, getattr(other, name, None))
    write_secret(path, json.dumps(claim).encode())
    with pytest.raises(ConfigError, match="was changed, or is damaged"):
        Claim.load(path)


def test_a_claim_that_somebody_else_signed_anew_still_has_to_fit_together(office, path, tmp_path):
    """Who can write the whole file can make a claim of his own; but not one for this federation's broker."""
    thief = SigningKey.generate()
    claim = msgspec.structs.replace(Claim.load(path), pins=(thief.public.hex(),))
    for changes, words in (
        ({"key": Office(tmp_path / "one", number=1).claim().key}, "not that of its certificate"),
        ({"authority": Office(tmp_path / "two", number=1).authority.certificate.pem.decode()}, "another authority's"),
        ({"federation": "others"}, "and says 'others'"),
        ({"certificate": "rubbish"}, "cannot be used"),
        ({"key": "rubbish"}, "cannot be used"),
        ({"broker": "http://x"}, "cannot be used"),
    ):
        msgspec.structs.replace(claim, **changes, signature="").signed(thief.sign).save(path)
        with pytest.raises(ConfigError, match=words):
            Claim.load(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", b"null", b" " * 70_000], ids=range(6))
def test_what_is_no_claim_is_refused(path, data):
    write_secret(path, data)
    with pytest.raises(ConfigError, match="claim"):
        Claim.load(path)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        Claim.load(path)


def test_its_files_for_tls_are_gone_afterwards(office, tmp_path):
    with office.claim().tls(tmp_path) as tls:
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tls.ca, tls.certificate, tls.key) if path} == {0o600}
        tls.context()
    assert not list(tmp_path.iterdir())


def test_its_files_for_tls_that_a_killed_start_has_left_are_gone_after_the_next(office, tmp_path):
    killed, claim = tmp_path / "identity", office.claim()
    with claim.tls(killed) as tls:
        shutil.copytree(tls.key.parent, killed / f"{tls.key.parent.name}x")
    (killed / "device.key").touch()
    assert len(list(killed.iterdir())) == 2
    with claim.tls(killed):
        pass
    assert [path.name for path in killed.iterdir()] == ["device.key"]
