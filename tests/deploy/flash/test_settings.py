"""Settings of a card: what cannot be is refused, secrets are not shown, other programs read what is written."""

import tomllib

import pytest

from deploy.flash.settings import CardSettings, Wifi, server_of
from edge_client.errors import FedgeError
from edge_client.service.settings import DeviceSettings
from tests.office import Office

SERVER = "mqtts://broker.example:8883/toys"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"


def test_the_key_of_a_network_is_that_of_the_standard():
    """The test vectors of IEEE 802.11, annex J.4.2."""
    assert Wifi.of("IEEE", "password", "GB").key == "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"
    wanted = "becb93866bb8c3832cb777c2f559807c8c59afcb6eae734885001300a981cc62"
    assert Wifi.of("ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ", "a" * 32, "GB").key == wanted
    assert Wifi.of("x", wanted.upper(), "GB").key == wanted


def test_secrets_are_not_shown():
    card = CardSettings("pi-1", SERVER, wifi=Wifi.of("home", "correct horse", "GB"), claim=b"secret claim")
    assert card.wifi.key not in repr(card)
    assert "secret" not in repr(card)
    assert "correct horse" not in card.card_toml


def test_a_device_reads_its_settings(tmp_path):
    card = CardSettings("pi-1", "mqtt://me:pass%40@192.0.2.1:1883/toys", data='drop:/srv/"x"', insecure=True)
    path = tmp_path / "device.toml"
    path.write_text(card.device_toml)
    found = DeviceSettings.load(path)
    assert found.options() == {"url": card.server, "client": "pi-1", "data": card.data, "insecure": True}


def test_the_cards_own_settings_are_toml():
    card = CardSettings("pi-1", SERVER, wifi=Wifi.of('Café "x"\\', "12345678", "DE"), ssh_keys=(KEY,), user="me")
    found = tomllib.loads(card.card_toml)
    assert (found["hostname"], found["user"], found["ssh_keys"]) == ("pi-1", "me", [KEY])
    assert found["wifi"] == {"ssid": 'Café "x"\\', "country": "DE", "key": card.wifi.key}


@pytest.mark.parametrize(
    "options",
    [
        {"name": "Pi_1"},
        {"name": "-pi"},
        {"name": "x" * 64},
        {"user": "root;"},
        {"ssh_keys": ("-----BEGIN OPENSSH PRIVATE KEY-----",)},
        {"ssh_keys": (f"{KEY}\nssh-rsa x",)},
        {"server": "http://broker"},
        {"server": "mqtt://192.0.2.1/toys"},
        {"data": "drop:/x\n[training]"},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(FedgeError):
        CardSettings(**{"name": "pi-1", "server": SERVER} | options)


@pytest.mark.parametrize(
    ("ssid", "passphrase", "country"),
    [
        ("", "12345678", "GB"),
        ("x" * 33, "12345678", "GB"),
        ("x", "short", "GB"),
        ("x", "1" * 65, "GB"),
        ("x", "", "gbr"),
    ],
)
def test_a_network_that_cannot_be_is_refused_without_its_passphrase(ssid, passphrase, country):
    with pytest.raises(FedgeError) as caught:
        Wifi.of(ssid, passphrase, country)
    assert not passphrase or passphrase not in str(caught.value)


def test_the_broker_is_the_claims_unless_another_is_named(tmp_path):
    claim = Office(tmp_path).claim()
    assert server_of(None, claim) == "mqtt://127.0.0.1:1/toys"
    assert server_of("mqtts://other:1", claim) == "mqtts://other:1/toys"
    assert server_of("mqtts://other:1/toys", claim) == "mqtts://other:1/toys"
    assert server_of(SERVER, None) == SERVER
    with pytest.raises(FedgeError, match="federation 'toys'"):
        server_of("mqtts://other:1/digits", claim)
    with pytest.raises(FedgeError, match="--server"):
        server_of(None, None)
