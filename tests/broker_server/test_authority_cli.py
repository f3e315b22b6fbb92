"""The commands of identity: what they write, what they say, and mistakes as one line."""

import pytest
from click.testing import CliRunner
from cryptography import x509

from broker_server import authority_cli
from broker_server.authority import REGISTRY, Authority
from broker_server.broker_config import mosquitto
from broker_server.broker_config.spec import BrokerSpec
from broker_server.registrar import Registrar
from broker_server.registry import Registry
from edge_client.enroll_cli import enroll
from edge_client.errors import FedgeError
from edge_client.trust.claim import Claim
from tests.office import Device, Office, issued


@pytest.fixture
def fedge(tmp_path, monkeypatch):
    """Runs a command in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    commands = {one.name: one for one in (authority_cli.ca, authority_cli.claim, authority_cli.approve,
                                          authority_cli.revoke, enroll)}  # fmt: skip

    def run(*arguments):
        name, *rest = (str(argument) for argument in arguments)
        done = CliRunner().invoke(commands[name], rest)
        if isinstance(done.exception, FedgeError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run


@pytest.fixture
def made(fedge, tmp_path):
    fedge("ca", "init", "--federation", "toys", "--host", "broker.example", "--host", "10.0.0.5")
    return tmp_path / "authority"


class Asking(Office):
    """An office that a command has made, with the server that answers there."""

    def __init__(self, folder, rule="claim"):
        self.folder, self.authority, self.registry = folder, Authority.load(folder), Registry.open(folder / REGISTRY)
        self.registrar = Registrar(self.authority, self.registry, rule)


def first(tmp_path):
    return Claim.load(min((tmp_path / "claims").glob("*.fedgeclaim")))


def now():
    return authority_cli.time.time()


def test_a_federation_is_made_claims_are_made_and_devices_shown(fedge, made, tmp_path):
    assert "next: fedge claim" not in fedge("claim", "--count", 3, "--valid", "12h")
    claims = [Claim.load(path) for path in (tmp_path / "claims").iterdir()]
    assert len(claims) == 3
    assert {claim.broker for claim in claims} == {"mqtts://broker.example:8883"}
    assert all(11.9 * 3600 < claim.expires - now() < 12.1 * 3600 for claim in claims)
    assert {path.name for path in (tmp_path / "claims").iterdir()} == {f"{c.user[1:]}.fedgeclaim" for c in claims}
    office = Asking(made)
    assert issued(Device(office, "pi-7").ask(claims[0], now())).name == "pi-7"
    shown = fedge("ca", "show")
    assert shown.startswith("toys: 1 devices\npi-7  enrolled, certificate until ")
    assert "open claims: 2" in shown
    assert "nothing waits" in shown


def test_the_broker_of_a_claim_can_be_named(fedge, made, tmp_path):
    fedge("claim", "--broker", "mqtt://127.0.0.1:1883/toys")
    assert str(first(tmp_path).address) == "mqtt://127.0.0.1:1883"
    with pytest.raises(FedgeError, match="expected no path, or 'toys'"):
        fedge("claim", "--broker", "mqtt://127.0.0.1:1883/others")


def test_the_broker_is_named_anew(fedge, made, tmp_path):
    fedge("ca", "broker", "--host", "10.0.0.9")
    fedge("claim")
    assert first(tmp_path).broker == "mqtts://10.0.0.9:8883"


def test_a_second_authority_is_not_written_over_the_first(fedge, made):
    before = (made / "ca.key").read_bytes()
    with pytest.raises(FedgeError, match="already"):
        fedge("ca", "init", "--federation", "toys", "--host", "h")
    assert (made / "ca.key").read_bytes() == before


def test_who_waits_is_listed_and_approved_by_name(fedge, made, tmp_path):
    fedge("claim", "--count", 2)
    office, claim = Asking(made, "ask"), first(tmp_path)
    device = Device(office, "pi-7")
    assert device.ask(claim, now()).status == "pending"
    listed = fedge("approve")
    assert listed.startswith("pi-7  waits since ")
    assert claim.user[1:] in listed
    assert device.key.public.hex()[:16] in listed
    assert fedge("approve", "pi-7") == "pi-7 is approved\n"
    assert device.ask(claim, now()).status == "issued"
    assert fedge("approve") == "nothing waits for approval\n"
    with pytest.raises(FedgeError, match="nothing waits for approval by the name 'pi-7'"):
        fedge("approve", "pi-7")


def test_where_two_ask_for_one_name_the_claim_decides(fedge, made, tmp_path):
    fedge("claim", "--count", 2)
    office = Asking(made, "ask")
    claims = [Claim.load(path) for path in sorted((tmp_path / "claims").iterdir())]
    devices = [Device(office, "pi-7") for _ in claims]
    for device, claim in zip(devices, claims, strict=True):
        device.ask(claim, now())
    with pytest.raises(FedgeError, match="2 devices ask for the name 'pi-7'"):
        fedge("approve", "pi-7")
    assert fedge("approve", claims[1].user[1:], "--refuse") == "pi-7 is refused\n"
    assert fedge("approve", claims[0].user) == "pi-7 is approved\n"
    assert [device.ask(claim, now()).status for device, claim in zip(devices, claims, strict=True)] == [
        "issued",
        "refused",
    ]


def test_a_revoked_device_has_no_key_at_the_server_and_is_on_the_brokers_list(fedge, made, tmp_path):
    fedge("claim")
    office = Asking(made)
    certificate = issued(Device(office, "pi-7").ask(first(tmp_path), now()))
    revision = office.registry.revision()
    assert fedge("revoke", "pi-7").startswith("pi-7 is revoked")
    assert office.registry.revision() != revision
    assert office.registry.keys(now()) == {}
    found = x509.load_pem_x509_crl((made / "crl.pem").read_bytes())
    assert [f"{entry.serial_number:x}" for entry in found] == [certificate.serial]
    assert "pi-7  revoked" in fedge("ca", "show")
    # Again, where the list was lost.
    (made / "crl.pem").unlink()
    fedge("revoke", "pi-7")
    assert len(x509.load_pem_x509_crl((made / "crl.pem").read_bytes())) == 1


def test_a_lost_claim_is_revoked(fedge, made, tmp_path):
    fedge("claim")
    claim = first(tmp_path)
    fedge("revoke", claim.user[1:])
    assert Device(Asking(made), "pi-7").ask(claim, now()).detail == "the claim was withdrawn"
    assert len(x509.load_pem_x509_crl((made / "crl.pem").read_bytes())) == 1


def test_without_the_authoritys_key_a_device_is_revoked_at_the_server_and_in_the_brokers_rules(fedge, made, tmp_path):
    fedge("claim")
    office = Asking(made)
    Device(office, "pi-7").ask(first(tmp_path), now())
    mosquitto.write(tmp_path / "broker", BrokerSpec("toys", made), "2.0")
    (made / "ca.key").rename(tmp_path / "safe")
    with pytest.raises(FedgeError, match=r"may still connect: put .*ca\.key back and say this again"):
        fedge("revoke", "pi-7")
    assert office.registry.keys(now()) == {}
    # What it may write and read needs no key.
    assert "user pi-7\ntopic deny #\n" in (tmp_path / "broker" / "acl").read_text()
    (tmp_path / "safe").rename(made / "ca.key")
    assert "pi-7 is revoked" in fedge("revoke", "pi-7")


def test_the_certificate_of_a_claim_that_was_used_is_revoked(fedge, made, tmp_path):
    fedge("claim")
    claim, office = first(tmp_path), Asking(made)
    Device(office, "pi-7").ask(claim, now())
    said = fedge("revoke", claim.user[1:])
    assert f"{claim.user[1:]} is revoked" in said
    assert "pi-7 was enrolled with it, and stays" in said
    assert list(office.registry.keys(now())) == ["pi-7"]
    assert len(x509.load_pem_x509_crl((made / "crl.pem").read_bytes())) == 1


MISTAKES = {
    "no authority": (["claim", "-a", "elsewhere"], "fedge ca init"),
    "federation": (["ca", "init", "-o", "other", "--federation", "a/b", "--host", "h"], "--federation 'a/b'"),
    "host": (["ca", "init", "-o", "other", "--federation", "f", "--host", "a..b"], "--host 'a..b'"),
    "unit": (["claim", "--valid", "7"], "--valid '7'"),
    "nothing": (["claim", "--valid", "0d"], "--valid '0d'"),
    "too long": (["claim", "--valid", "600w"], "ten years"),
    "broker": (["claim", "--broker", "http://h"], "mqtt://host:port"),
    "nobody": (["revoke", "pi-9"], "no device that is enrolled"),
    "no claim": (["revoke", "claim-00000000"], "no claim; see"),
    "no file": (["enroll", "none.fedgeclaim", "--id", "pi"], "cannot be read"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_says_what_was_expected(fedge, made, case):
    arguments, words = MISTAKES[case]
    with pytest.raises(FedgeError) as refused:
        fedge(*arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_is_certified_by_a_clock_that_cannot_be_right(fedge, made, monkeypatch):
    monkeypatch.setattr(authority_cli.time, "time", lambda: 1e9)
    for arguments in (["claim"], ["ca", "init", "-o", "other", "--federation", "f", "--host", "h"]):
        with pytest.raises(FedgeError, match="the clock shows 2001"):
            fedge(*arguments)
