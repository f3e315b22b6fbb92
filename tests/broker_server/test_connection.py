"""The server's connection: an embedded broker that asks for certificates, brokers elsewhere, and who is trusted."""

import json
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from broker_server.authority import Authority
from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.broker_config import programs
from broker_server.broker_config.reload import reload_all
from broker_server.broker_config.spec import BrokerSpec
from broker_server.config import Federation
from broker_server.connection import broker, server_link
from broker_server.registry import DeviceRow, Registry
from edge_client.address import Address
from edge_client.cli import doctor
from edge_client.doctor.broker import reach
from edge_client.doctor.peer import Peer
from edge_client.errors import ConfigError, TransportError
from edge_client.tls import Tls
from tests.certificates import Certificates

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")


@pytest.fixture
def authority(tmp_path):
    return Certificates(tmp_path / "authority of the fleet")


def settings(tmp_path, **sections):
    head = {"name": "fleet", "bundle": "b", "state": str(tmp_path / "the state")}
    return msgspec.convert({"federation": head, **sections}, Federation)


@needs_mosquitto
def test_with_an_authority_the_embedded_broker_asks_for_certificates_on_any_address(tmp_path, authority):
    config = settings(tmp_path, trust={"authority": str(authority.folder)}, broker={"host": "0.0.0.0"})
    said = []
    with broker(config, said.append) as (address, tls):
        assert address == Address("127.0.0.1", address.port, tls=True)
        assert said == [f"broker: mosquitto on mqtts://127.0.0.1:{address.port}"]
        assert tls == Tls.of(authority.folder, "server")
        assert server_link(config, address, tls=tls).tls == tls
        with Peer(address, "server", tls=tls) as server:
            assert server.subscribe(["fedge/fleet/up/#"]) == [True]
        with pytest.raises(TransportError, match="asks for a certificate"), Peer(address, "x", tls=Tls(tls.ca)):
            pass
        # What `fedge revoke` does: the broker of a server that runs is found by its authority.
        device = authority.device("pi-7")
        with Peer(address, "device", tls=Tls.of(device)):
            authority.revoke(device / "device.crt")
        (line,) = reload_all(authority.folder, revoked=["pi-7"])
        assert line == f"{tmp_path / 'the state' / 'broker'}: mosquitto reads its rules again"
        deadline, refused = time.monotonic() + 10, ""
        while "it is revoked" not in refused and time.monotonic() < deadline:
            try:
                Peer(address, "device", tls=Tls.of(device)).__enter__().cut()
            except TransportError as error:
                refused = str(error)
        assert "it is revoked" in refused


@needs_mosquitto
def test_the_embedded_broker_knows_from_its_start_who_was_revoked(tmp_path):
    """The list may not have been written: the key that signs it is away."""
    authority = Certificates(tmp_path / "authority")
    with Registry.create(authority.folder / "registry.db") as registry:
        registry.certify(DeviceRow("1", "pi-1", bytes(32), b"", 0.0, 4e9, None))
        registry.revoke("pi-1", 1.0)
    with broker(settings(tmp_path, trust={"authority": str(authority.folder)}), lambda _: None):
        assert "user pi-1\ntopic deny #\n" in (tmp_path / "the state" / "broker" / "acl").read_text()


@needs_mosquitto
def test_the_doctor_examines_a_broker_that_asks_for_certificates_with_the_authoritys_folder(tmp_path, authority):
    own = Authority.init(tmp_path / "authority", "fleet", ["localhost"], now=time.time())
    with EmbeddedBroker.start(tmp_path / "own", spec=BrokerSpec("fleet", own.folder)) as running:
        arguments = ["--broker", running.url, "--identity", str(own.folder), "--json"]
        done = CliRunner().invoke(doctor, arguments)
        assert done.exit_code == 0, done.output
        (report,) = json.loads(done.stdout)
        found = {one["name"]: one["found"] for one in report["findings"]}
        assert found["passwords"] == "nobody is let in without a certificate"
        assert "is acknowledged and dropped" in found["access rules"]


@needs_mosquitto
def test_the_doctor_says_whether_a_broker_lets_a_device_in(tmp_path, authority):
    with EmbeddedBroker.start(tmp_path / "broker", spec=BrokerSpec("fleet", authority.folder)) as running:
        address = Address.parse(running.url)
        assert reach(address, Tls.of(authority.device("pi"))).level == "good"
        stranger = reach(address, Tls(authority.folder / "ca.crt"))
        assert stranger.level == "bad"
        assert "--identity" in stranger.advice


def test_certificates_need_mosquitto(tmp_path, authority, monkeypatch):
    spec = BrokerSpec("fleet", authority.folder)
    with pytest.raises(ConfigError, match=r"trust\.authority is set and .*amqtt cannot ask for certificates"):
        EmbeddedBroker.start(tmp_path / "broker", kind="amqtt", spec=spec)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "PLACES", (str(tmp_path),))
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        EmbeddedBroker.start(tmp_path / "broker", spec=spec)


def test_a_broker_of_ones_own_with_certificates_of_ones_own(tmp_path, authority):
    url, trust = "mqtts://broker.example:8883", {"authority": str(authority.folder)}
    named = {"tls_ca": "/a/ca.pem", "tls_certificate": "/a/me.pem", "tls_key": "/a/me.key"}
    cases = [
        (settings(tmp_path, broker={"url": url}), None),
        (settings(tmp_path, broker={"url": url, "tls_ca": "/a/ca.pem"}), Tls(ca=Path("/a/ca.pem"))),
        (settings(tmp_path, broker={"url": url}, trust=trust), Tls.of(authority.folder, "server")),
        (
            settings(tmp_path, broker={"url": url, **named}, trust=trust),
            Tls(Path("/a/ca.pem"), Path("/a/me.pem"), Path("/a/me.key")),
        ),
    ]
    for config, expected in cases:
        with broker(config, lambda line: None) as (address, tls):
            assert address == Address("broker.example", 8883, tls=True)
            assert tls == expected


BAD = {
    "certificate without a key": ({"url": "mqtts://h", "tls_certificate": "a"}, "belong together"),
    "authority without TLS": ({"url": "mqtt://localhost", "tls_ca": "a"}, "expected one with mqtts://"),
    "in the open": ({"url": "mqtt://broker.example"}, "use mqtts://, or say --insecure"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_together_is_named(tmp_path, name):
    section, words = BAD[name]
    with pytest.raises(ConfigError, match=words), broker(settings(tmp_path, broker=section), lambda line: None):
        pass


def test_in_the_open_when_told_to(tmp_path):
    config = settings(tmp_path, broker={"url": "mqtt://broker.example"})
    with broker(config, lambda line: None, insecure=True) as (address, tls):
        assert address == Address("broker.example", 1883)
        assert tls is None
