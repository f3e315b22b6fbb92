"""An identity is whole or not there, whenever the power is cut; and it is its owner's alone."""

import contextlib
import json
import stat

import pytest

from edge_client.errors import ConfigError
from edge_client.trust import identity as module
from edge_client.trust.certificate import Certificate, make_request
from edge_client.trust.identity import Identity, due, prepare, store
from edge_client.trust.keys import SigningKey, read_publics, write_secret
from tests.office import DAY, NOW, Office


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office") / "authority")


def certified(office, folder, client="pi-7", now=NOW):
    key = prepare(folder)
    return office.authority.issue(make_request(key, client), client, 30.0, now=now)


def stored(office, folder, now=NOW):
    certificate = certified(office, folder, now=now)
    return store(folder, certificate, office.authority.certificate, office.authority.pins, now)


def test_an_identity_is_read_back_as_it_was_stored(office, tmp_path):
    made = stored(office, tmp_path / "identity")
    assert made == Identity.load(tmp_path / "identity")
    assert (made.federation, made.client, made.issued, made.expires) == ("toys", "pi-7", NOW, NOW + 30 * DAY)
    assert made.pins == office.authority.pins
    assert made.key.public == Certificate.parse((tmp_path / "identity/device.crt").read_bytes()).public
    about = json.loads((tmp_path / "identity/identity.json").read_text())
    assert about == {
        "federation": "toys",
        "client": "pi-7",
        "serial": made.serial,
        "issued": NOW,
        "expires": NOW + 30 * DAY,
    }


def test_its_files_are_its_owners_alone_and_no_others(office, tmp_path):
    stored(office, tmp_path / "identity")
    names = {"device.key", "device.crt", "ca.crt", "federation.pub", "identity.json"}
    assert {entry.name for entry in (tmp_path / "identity").iterdir()} == names
    for path in (tmp_path / "identity").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


def test_it_shows_itself_by_tls_with_these_files(office, tmp_path):
    tls = stored(office, tmp_path).tls
    assert (tls.ca, tls.certificate, tls.key) == tuple(
        tmp_path / name for name in ("ca.crt", "device.crt", "device.key")
    )


def test_a_key_is_made_once(tmp_path):
    first = prepare(tmp_path)
    assert prepare(tmp_path).public == first.public


def test_a_key_that_others_may_read_is_no_identity(office, tmp_path):
    stored(office, tmp_path)
    (tmp_path / "device.key").chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(tmp_path)
    with pytest.raises(ConfigError, match="chmod 600"):
        prepare(tmp_path)


@pytest.mark.parametrize("name", ["device.key", "device.crt", "ca.crt", "federation.pub", "identity.json"])
def test_what_is_missing_or_damaged_is_named(office, tmp_path, name):
    stored(office, tmp_path)
    data = (tmp_path / name).read_bytes()
    write_secret(tmp_path / name, b"{" + data[: len(data) // 2])
    with pytest.raises(ConfigError, match=name):
        Identity.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}.*cannot be read"):
        Identity.load(tmp_path)


def test_parts_of_two_identities_are_none(office, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    stored(office, one)
    stored(office, other)
    key = (one / "device.key").read_bytes()
    write_secret(one / "device.key", (other / "device.key").read_bytes())
    with pytest.raises(ConfigError, match="not for the key"):
        Identity.load(one)
    write_secret(one / "device.key", key)
    write_secret(one / "ca.crt", Office(tmp_path / "office", number=1).authority.certificate.pem)
    with pytest.raises(ConfigError, match="not issued by"):
        Identity.load(one)


class PowerCut(Exception):  # noqa: N818
    pass


def cut(monkeypatch, after):
    """Let so many files be written, then none."""
    written = []

    def write(path, data):
        if len(written) == after:
            raise PowerCut
        written.append(path)
        write_secret(path, data)

    monkeypatch.setattr(module, "write_secret", write)
    monkeypatch.setattr("edge_client.trust.keys.write_secret", write)


@pytest.mark.parametrize("after", range(6))
def test_a_power_cut_between_any_two_writes_of_enrolment_leaves_none_or_a_whole_one(
    office, tmp_path, monkeypatch, after
):
    with monkeypatch.context() as patch:
        cut(patch, after)
        try:
            stored(office, tmp_path)
            assert after >= 5
        except PowerCut:
            assert after < 5
    assert Identity.there(tmp_path) == (after >= 5)
    if after >= 5:
        assert Identity.load(tmp_path).client == "pi-7"
    # And it can be gone on with.
    if after:
        held = SigningKey.load(tmp_path / "device.key").public
        assert stored(office, tmp_path).key.public == held


@pytest.mark.parametrize("after", range(5))
def test_a_power_cut_between_any_two_writes_of_renewal_leaves_the_old_or_the_new_one(
    office, tmp_path, monkeypatch, after
):
    old = stored(office, tmp_path)
    later = NOW + 25 * DAY
    with monkeypatch.context() as patch:
        cut(patch, after)
        with contextlib.suppress(PowerCut):
            stored(office, tmp_path, now=later)
    found = Identity.load(tmp_path)
    whole = after >= 4
    assert found.key.public == old.key.public
    assert found.expires == (later if whole else NOW) + 30 * DAY
    assert (found.serial == old.serial) == (not whole)
    assert found.pins == read_publics(tmp_path / "federation.pub")


def test_it_is_due_in_the_last_third_of_its_life(office, tmp_path):
    made = stored(office, tmp_path)
    assert not made.due(NOW)
    assert not made.due(NOW + 19.9 * DAY)
    assert made.due(NOW + 20.1 * DAY)
    assert made.due(made.expires + DAY)
    assert not due(NOW, NOW + 3, NOW + 1.9)
