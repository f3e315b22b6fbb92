"""The registry: one file for server and commands; each sees what the others write, and nothing is half-written."""

import pytest

from broker_server.database import Database
from broker_server.keyring import Keyring
from broker_server.registry import DeviceRow, Registry
from edge_client.errors import ConfigError, LedgerError
from edge_client.trust.keys import SigningKey
from tests.office import NOW, WEEK

KEY, OTHER = bytes(32), bytes([1]) * 32


@pytest.fixture
def registry(tmp_path):
    with Registry.create(tmp_path / "registry.db") as made:
        yield made


def device(client="pi", serial="a", key=KEY, expires=NOW + WEEK):
    return DeviceRow(serial, client, key, b"der", NOW, expires, None)


def test_there_has_to_be_one(tmp_path):
    with pytest.raises(ConfigError, match="fedge ca init"):
        Registry.open(tmp_path / "registry.db")
    (tmp_path / "registry.db").write_bytes(b"x" * 5000)
    with pytest.raises(LedgerError):
        Registry.open(tmp_path / "registry.db")


def test_it_is_its_owners_alone_from_its_first_byte_on(tmp_path, monkeypatch):
    modes, write_to = [], Database.write_to

    def noting(path, *more):
        modes.append(path.stat().st_mode & 0o777)
        return write_to(path, *more)

    monkeypatch.setattr(Database, "write_to", noting)
    with Registry.create(tmp_path / "registry.db") as registry:
        registry.certify(device())
        assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("registry.db*") if path.suffix != ".lock"} == {0}
    assert modes == [0o600]


def test_devices_have_keys_until_they_expire_or_are_revoked(registry):
    registry.certify(device("a", "1", KEY))
    registry.certify(device("b", "2", OTHER))
    assert registry.keys(NOW) == {"a": KEY, "b": OTHER}
    assert registry.keys(NOW + WEEK) == {}
    assert registry.revoke("a", NOW)
    assert registry.keys(NOW) == {"b": OTHER}
    assert registry.standing(NOW) == (("b",), ("a",))


def test_the_last_certificate_counts_and_all_are_revoked(registry):
    for serial in ("1", "2", "3"):
        registry.certify(device(serial=serial, expires=NOW + WEEK * int(serial)))
    assert registry.device("pi").serial == "3"
    assert [one.serial for one in registry.devices()] == ["3"]
    assert registry.revoke("pi", NOW + 1)
    assert registry.revoked(NOW) == [(serial, NOW + 1) for serial in ("1", "2", "3")]
    # Those that have expired need no list.
    assert registry.revoked(NOW + WEEK) == [("2", NOW + 1), ("3", NOW + 1)]
    assert not registry.revoke("pi", NOW + 2)
    assert not registry.revoke("nobody", NOW)


def test_a_key_has_one_owner_the_last(registry):
    assert registry.owner(KEY) is None
    registry.certify(device("a", "1", KEY))
    registry.revoke("a", NOW)
    registry.certify(device("a", "2", OTHER))
    assert registry.owner(KEY).revoked == NOW
    assert registry.owner(OTHER).revoked is None
    assert registry.keys(NOW) == {"a": OTHER}


def test_a_serial_is_used_once(registry):
    registry.certify(device())
    with pytest.raises(LedgerError):
        registry.certify(device())


def test_a_claim_is_decided_once(registry):
    registry.add_claims([("@claim-1", KEY, "c1", NOW + WEEK), ("@claim-2", OTHER, "c2", NOW + WEEK)], NOW)
    assert [one.user for one in registry.claims("open")] == ["@claim-1", "@claim-2"]
    assert not registry.decide("@claim-1", approved=True)
    registry.bind("@claim-1", "pi", OTHER, "pending", NOW + 1)
    registry.bind("@claim-1", "pi", OTHER, "pending", NOW + 9)
    (waiting,) = registry.claims("pending")
    assert (waiting.client, waiting.device, waiting.asked) == ("pi", OTHER, NOW + 1)
    assert registry.decide("@claim-1", approved=True)
    assert not registry.decide("@claim-1", approved=False)
    assert registry.claim("@claim-1").state == "approved"
    assert registry.withdraw("@claim-2", NOW)
    assert registry.claim("@claim-2").state == "refused"
    assert registry.revoked(NOW) == [("c2", NOW)]
    assert not registry.withdraw("@claim-3", NOW)


def test_the_certificate_of_a_claim_that_was_used_is_revoked_and_what_was_issued_with_it_stays(registry):
    registry.add_claims([("@claim-1", KEY, "c1", NOW + WEEK)], NOW)
    registry.bind("@claim-1", "pi", OTHER, "issued", NOW)
    assert registry.withdraw("@claim-1", NOW)
    assert registry.revoked(NOW) == [("c1", NOW)]
    assert registry.claim("@claim-1").state == "issued"


def test_claims_are_added_all_or_none(registry):
    with pytest.raises(LedgerError):
        registry.add_claims([("@claim-1", KEY, "c1", NOW), ("@claim-1", KEY, "c2", NOW)], NOW)
    assert not registry.claims("open")


def test_others_see_what_was_written_and_that_something_was(registry, tmp_path):
    with Registry.open(tmp_path / "registry.db") as server:
        before = server.revision()
        assert server.revision() == before
        registry.certify(device())
        assert server.revision() != before
        assert server.keys(NOW) == {"pi": KEY}
        before = server.revision()
        registry.revoke("pi", NOW)
        assert server.revision() != before
        assert server.keys(NOW) == {}


def test_the_server_hears_at_once_of_a_device_that_a_command_revokes(registry, tmp_path):
    signing = SigningKey.generate()
    with Registry.open(tmp_path / "registry.db") as devices:
        ring = Keyring(signing, (signing.public,), devices)
        registry.certify(device())
        assert ring.refresh(NOW) == (("pi",), ())
        assert ring.key("pi") == KEY
        registry.revoke("pi", NOW)
        assert ring.refresh(NOW) == ((), ("pi",))
        assert ring.key("pi") is None


def test_what_is_read_in_a_group_is_written_before_anybody_else_writes(registry, tmp_path, monkeypatch):
    monkeypatch.setattr("broker_server.database._PATIENCE", 0.01)
    with Registry.open(tmp_path / "registry.db") as other, registry.group():
        assert registry.device("pi") is None
        with pytest.raises(LedgerError, match="locked"):
            other.certify(device())
        registry.certify(device())
    assert registry.device("pi") is not None


def test_what_fails_in_a_group_is_not_written(registry):
    def fail():
        with registry.group():
            registry.certify(device())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert registry.device("pi") is None
