"""What the doctor says about real brokers: each with settings that make it do something else."""

import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker_server.broker import EmbeddedBroker, find_mosquitto
from edge_client.address import Address
from edge_client.doctor.broker import examine, reach
from edge_client.doctor.limits import fitting, largest_payload
from edge_client.doctor.peer import Peer
from tests.nats import free_ports, nats, needs_nats

DEPLOY = Path(__file__).parents[3] / "deploy" / "mosquitto"
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
PLAIN = "listener {port} {host}\nallow_anonymous true\n"


@contextmanager
def mosquitto(folder, configuration):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("broker_server.broker._MOSQUITTO_CONF", configuration)
        with EmbeddedBroker.start(folder, kind="mosquitto") as broker:
            yield Address.parse(broker.url)


def findings(report):
    return {finding.name: finding for finding in report.findings}


def said(report):
    return {finding.name: (finding.level, finding.found) for finding in report.findings}


@needs_mosquitto
def test_mosquitto_as_debian_sets_it_works_and_loses_what_its_queue_does_not_hold(tmp_path):
    with mosquitto(tmp_path, PLAIN) as address:
        report = examine(address)
        with Peer(address, "after") as peer:
            peer.subscribe(["#"])
            assert peer.take(1, 0.5) == []
    assert report.works
    assert report.chunk == 65536
    found = findings(report)
    assert {name for name, one in found.items() if one.level == "note"} == {"full queue", "access rules", "passwords"}
    assert "1,020 of 2,000" in found["full queue"].found
    assert "acknowledges and loses" in found["full queue"].found
    assert "max_queued_messages" in found["full queue"].advice
    assert found["MQTT 5"].found == "spoken"


@needs_mosquitto
@pytest.mark.parametrize(
    ("setting", "tells"),
    [("message_size_limit 20000", False), ("max_packet_size 20000", True)],
    ids=lambda one: str(one),
)
def test_a_limit_on_messages_is_measured_whether_the_broker_drops_them_or_hangs_up(tmp_path, setting, tells):
    with mosquitto(tmp_path, f"{PLAIN}{setting}\n") as address:
        found = largest_payload(address, "fd-test", "fedge/doctor/probe/test", 70_000)
        report = examine(address)
    assert 18_432 <= found <= 20_000
    assert report.works
    assert report.chunk == 18_432
    size = findings(report)["message size"]
    assert size.level == "note"
    assert f"{report.chunk:,}" in size.found
    assert ("20,000" in findings(report)["MQTT 5"].found) == tells


@needs_mosquitto
def test_a_broker_that_takes_next_to_nothing_will_not_do(tmp_path):
    with mosquitto(tmp_path, f"{PLAIN}message_size_limit 1500\n") as address:
        report = examine(address)
    assert not report.works
    assert said(report)["message size"] == ("bad", "at most 1,024 bytes pass; fedge needs 2,048")


@needs_mosquitto
def test_a_broker_that_retains_nothing_will_not_do(tmp_path):
    with mosquitto(tmp_path, f"{PLAIN}retain_available false\n") as address:
        report = examine(address)
    assert not report.works
    assert report.findings[-1].name == "retained, exact"
    assert report.findings[-1].level == "bad"


@needs_mosquitto
def test_with_access_rules_the_servers_user_is_the_one_to_ask(tmp_path):
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    for user in ("server", "pi-1"):
        subprocess.run(["mosquitto_passwd", "-b", passwords, user, "secret"], check=True)
    text = (DEPLOY / "fedge.conf").read_text().replace("/etc/mosquitto/fedge.passwords", str(passwords))
    text = text.replace("/etc/mosquitto/fedge.acl", str(DEPLOY / "fedge.acl"))
    text = text.replace("listener 1883", "user root\nlistener {port} {host}")
    with mosquitto(tmp_path / "broker", text) as address:
        server = examine(Address(address.host, address.port, username="server", password="secret"))
        device = examine(Address(address.host, address.port, username="pi-1", password="secret"))
        wrong = examine(Address(address.host, address.port, username="pi-1", password="wrong"))
        assert reach(Address(address.host, address.port, username="pi-1", password="secret")).level == "good"
        assert reach(address).level == "bad"
    assert server.works
    assert findings(server)["full queue"].level == "good"
    assert findings(server)["passwords"].found == "nobody is let in without one"
    denied = findings(server)["access rules"]
    assert denied.level == "good"
    assert "acknowledged and dropped (MQTT 5 says 'Not authorized')" in denied.found
    assert not device.works
    assert device.findings[-1].name == "round trip"
    assert "server" in device.findings[-1].advice
    assert [finding.name for finding in wrong.findings] == ["MQTT 3.1.1"]
    assert "ot authori" in wrong.findings[0].found


def test_amqtt_works_without_mqtt_5(tmp_path):
    with EmbeddedBroker.start(tmp_path, kind="amqtt") as broker:
        report = examine(Address.parse(broker.url))
    # amqtt loses retained messages when others subscribe at that moment; a federation asks for them again.
    assert not [finding for finding in report.findings if finding.level == "bad" and finding.name != "many chunks"]
    assert report.chunk == 65536
    assert said(report)["MQTT 5"] == ("note", "not spoken; fedge does not need it")


@needs_nats
def test_nats_works_without_mqtt_5_and_without_dots(tmp_path):
    with nats(tmp_path) as (node,):
        report = examine(Address("127.0.0.1", node.mqtt))
    assert report.works, report
    assert report.chunk == 65536
    found = said(report)
    assert found["MQTT 5"] == ("note", "not spoken; fedge does not need it")
    assert found["dots in names"] == ("note", "topics must not have dots")
    assert found["offline delivery"][0] == "good"


def test_where_no_broker_is_there_is_one_finding():
    address = Address("127.0.0.1", free_ports(1)[0])
    report = examine(address)
    assert not report.works
    ((name, (level, found)),) = said(report).items()
    assert (name, level) == ("MQTT 3.1.1", "bad")
    assert "refused" in found
    assert reach(address).level == "bad"


@pytest.mark.parametrize(
    ("limit", "chunk", "expected"),
    [
        (2048, 65536, 1024),
        (20_000, 65536, 18_432),
        (20_000, 4096, 4096),
        (131_072, 65536, 65536),
        (70_000, 66_000, 66_000),
    ],
)
def test_a_chunk_leaves_room_in_its_message(limit, chunk, expected):
    assert fitting(limit, chunk) == expected
