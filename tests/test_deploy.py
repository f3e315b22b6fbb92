"""What deploy/ ships: units that set what they must, and a broker configuration that mosquitto takes and enforces."""

import asyncio
import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from broker_server.broker import EmbeddedBroker, find_mosquitto
from edge_client.address import Address
from edge_client.errors import TransportError
from edge_client.transport import MqttLink

DEPLOY = Path(__file__).parents[1] / "deploy"
# Those of updates have tests of their own.
UNITS = [path for path in sorted(DEPLOY.glob("systemd/*.service")) if not path.name.startswith("fedge-update")]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_switch_telemetry_off_and_restart_after_a_failure(path):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string(path.read_text())
    assert "Environment=ORT_DISABLE_TELEMETRY=1" in path.read_text().splitlines()
    command = unit["Service"]["ExecStart"].split()
    if unit["Service"].get("Type") == "oneshot":
        # They come back with the next boot, and say what is wrong.
        assert command[0] == "/usr/bin/python3"
        assert (DEPLOY / "firstboot" / Path(command[1]).name).exists()
        assert unit["Service"]["StandardOutput"] == unit["Service"]["StandardError"] == "journal+console"
        return
    assert unit["Service"]["Restart"] == "on-failure"
    assert command[:2] in (["/opt/fedge/current/bin/fedge", "join"], ["/opt/fedge/current/bin/fedge", "serve"])


class Listener:
    """A link's handler that keeps what it hears."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    def connected(self) -> None:
        self.up.set()

    def disconnected(self, reason: str) -> None:
        self.up.clear()

    def message(self, topic: str, payload: bytes) -> None:
        self.heard.put_nowait((topic, payload))


@pytest.mark.skipif(
    find_mosquitto() is None or shutil.which("mosquitto_passwd") is None, reason="needs the Debian package mosquitto"
)
def test_devices_write_only_their_own_topics(tmp_path, monkeypatch):
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    for user in ("server", "pi-1", "pi-2"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, "secret"], check=True)
    text = (DEPLOY / "mosquitto" / "fedge.conf").read_text()
    text = text.replace("/etc/mosquitto/fedge.passwords", str(passwords))
    text = text.replace("/etc/mosquitto/fedge.acl", str(DEPLOY / "mosquitto" / "fedge.acl"))
    # mosquitto gives up root for a user that cannot read the test's folder.
    text = text.replace("listener 1883", "user root\nlistener {port} {host}")
    monkeypatch.setattr("broker_server.broker._MOSQUITTO_CONF", text)
    with EmbeddedBroker.start(tmp_path / "broker", kind="mosquitto") as broker:
        asyncio.run(asyncio.wait_for(_speak(Address.parse(broker.url)), 30))


async def _speak(address: Address) -> None:
    def link(user: str | None) -> MqttLink:
        named = Address(address.host, address.port, username=user, password="secret") if user else address
        return MqttLink(named, f"test-{user}", attempts=1)

    stranger = link(None)
    with pytest.raises(TransportError, match=r"(?i)not authori[sz]ed"):
        await stranger.run(Listener())
    links = {user: link(user) for user in ("server", "pi-1", "pi-2")}
    ears = {user: Listener() for user in links}
    lives = [asyncio.ensure_future(links[user].run(ears[user])) for user in links]
    for ear in ears.values():
        await ear.up.wait()
    links["server"].subscribe(("fedge/digits/up/#",))
    links["pi-1"].subscribe(("fedge/digits/down/pi-2/msg", "fedge/digits/down/pi-1/msg"))
    links["pi-2"].publish("fedge/digits/up/pi-1/msg", b"in another's name")
    links["pi-2"].publish("fedge/digits/up/pi-2/msg", b"in its own")
    assert await ears["server"].heard.get() == ("fedge/digits/up/pi-2/msg", b"in its own")
    links["server"].publish("fedge/digits/down/pi-2/msg", b"for pi-2")
    links["server"].publish("fedge/digits/down/pi-1/msg", b"for pi-1")
    assert await ears["pi-1"].heard.get() == ("fedge/digits/down/pi-1/msg", b"for pi-1")
    for one in links.values():
        await one.close()
    await asyncio.gather(*lives)
