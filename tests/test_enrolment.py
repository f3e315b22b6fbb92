"""Enrolment end to end: commands, a real server, a real mosquitto, and devices with nothing but a claim."""

import asyncio
import contextlib
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker_server import authority_cli
from broker_server.authority import Authority
from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.broker_config.spec import BrokerSpec
from broker_server.registry import Registry
from broker_server.responder import responding
from edge_client import cli
from edge_client.address import Address
from edge_client.errors import ConfigError
from edge_client.tls import Tls
from edge_client.transport import MqttLink
from edge_client.trust.enrol import enroll
from edge_client.trust.identity import Identity
from tests.federation import ROOT, Serving, claims, enrolled, fedge
from tests.office import DAY
from tests.toy import toy_bundle

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")

TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"
[trust]
authority = "authority"
[round]
cohort = 1
"""


def test_from_nothing_to_an_enrolled_device_and_out_again_with_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.fedge").write_bytes(toy_bundle())
    (tmp_path / "federation.toml").write_text(TOML)
    fedge("ca", "init", "--federation", "toys", "--host", "localhost")
    with Serving(tmp_path) as server:
        url = server.until("broker: mosquitto on ").split(" on ")[1]
        fedge("claim", "--count", 2, "--broker", url)
        first, second = sorted((tmp_path / "claims").iterdir())
        done = fedge("enroll", first, "--id", "pi-7", "--state", tmp_path / "pi-7")
        assert "pi-7 is enrolled in 'toys'" in done
        server.until("enrolment: 'pi-7' enrolled by @claim-")
        identity = Identity.load(tmp_path / "pi-7" / "identity")
        assert (identity.client, identity.federation) == ("pi-7", "toys")
        for path in identity.folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Twice is once: what first boot does, it may do at every boot.
        again = fedge("enroll", first, "--id", "pi-7", "--state", tmp_path / "pi-7")
        assert "already" in again
        assert Identity.load(identity.folder) == identity
        # The claim is that device's for good.
        stolen = fedge("enroll", first, "--id", "pi-8", "--state", tmp_path / "pi-8")
        assert "'toys' refuses 'pi-8': the claim was used already, with another key" in stolen
        assert server.until("refused 'pi-8'").endswith("each device needs one of its own")
        # Nor can another one take the device's name.
        twin = fedge("enroll", second, "--id", "pi-7", "--state", tmp_path / "twin")
        assert "is another device" in twin
        assert "pi-7 is revoked" in fedge("revoke", "pi-7")
        assert "'pi-7' was revoked" in fedge("enroll", second, "--id", "pi-7", "--state", tmp_path / "twin")
        assert "pi-9 is enrolled" in fedge("enroll", second, "--id", "pi-9", "--state", tmp_path / "new")
        with Registry.open(tmp_path / "authority" / "registry.db") as registry:
            assert registry.keys(0.0) == {"pi-9": Identity.load(tmp_path / "new" / "identity").key.public}
    secret = (identity.folder / "device.key").read_text().split("\n")[1]
    assert all(secret not in line for line in server.lines)


def join(url: str, *options) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "edge_client.cli", "join", url, "--data", "x.npz", *map(str, options)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_device_renews_its_certificate_by_itself_while_it_takes_part(tmp_path):
    now = authority_cli.time.time()
    authority = Authority.init(tmp_path / "authority", "toys", ["localhost"], now=now)
    before = enrolled(authority, tmp_path / "pi-7" / "identity", "pi-7", now - 25 * DAY)

    async def play(broker: EmbeddedBroker) -> None:
        address = Address.parse(broker.url)

        def enrolling(name):
            return MqttLink(address, name, tls=Tls.of(authority.folder, "enrol"))

        async with responding(authority.folder, "toys", enrolling, print, days=30.0):
            device = join(broker.url + "/toys", "--id", "pi-7", "--state", tmp_path / "pi-7")
            lines = [await asyncio.to_thread(device.stderr.readline) for _ in range(2)]
            device.send_signal(signal.SIGTERM)
            rest = await asyncio.to_thread(device.communicate, timeout=20)
        assert device.returncode == 0, rest
        assert lines[0] == f"pi-7: joining 'toys' at {broker.url}\n"
        assert lines[1].endswith(": it was renewed\n")

    with EmbeddedBroker.start(
        tmp_path / "broker", kind="mosquitto", spec=BrokerSpec("toys", authority.folder)
    ) as broker:
        asyncio.run(play(broker))
    after = Identity.load(before.folder)
    assert after.serial != before.serial
    assert after.expires > before.expires + 20 * DAY
    assert after.key.public == before.key.public


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--id", "pi-8"], "is the identity of 'pi-7' in federation 'toys'; expected 'pi-8' in 'toys'"),
        (["--id", "pi-7", "--federation", "others"], "expected 'pi-7' in 'others'"),
    ],
)
def test_an_identity_is_used_by_its_device_alone(tmp_path, options, words):
    now = authority_cli.time.time()
    authority = Authority.init(tmp_path / "authority", "toys", ["localhost"], now=now)
    identity = enrolled(authority, tmp_path / "identity", "pi-7", now)
    arguments = ["mqtt://127.0.0.1:1/toys", "--data", "x.npz", *options, "--state", tmp_path / "state"]
    done = CliRunner().invoke(cli.join, list(map(str, [*arguments, "--identity", identity.folder])))
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert not (tmp_path / "state").exists()


# Over TLS, with the configuration that is generated for mosquitto.


class Watcher:
    """A client that only looks whether the broker lets it in, and keeps what it hears."""

    def __init__(self, address: Address, tls: Tls, topics=()) -> None:
        self.link = MqttLink(address, "watcher", attempts=1, tls=tls)
        self.topics, self.heard, self.there = topics, asyncio.Queue(), asyncio.Event()

    def connected(self):
        self.link.subscribe(self.topics)
        self.there.set()

    def disconnected(self, reason):
        pass

    def message(self, topic, payload):
        self.heard.put_nowait(payload)


async def refused(address: Address, tls: Tls) -> str:
    """Why the broker does not let one in."""
    watcher = Watcher(address, tls)
    life = asyncio.ensure_future(watcher.link.run(watcher))
    there = asyncio.ensure_future(watcher.there.wait())
    async with asyncio.timeout(20):
        await asyncio.wait((life, there), return_when=asyncio.FIRST_COMPLETED)
    there.cancel()
    await watcher.link.close()
    (ended,) = await asyncio.gather(life, return_exceptions=True)
    return str(ended or "let in")


@contextlib.asynccontextmanager
async def connected(address: Address, tls: Tls, topics=()):
    watcher = Watcher(address, tls, topics)
    life = asyncio.ensure_future(watcher.link.run(watcher))
    async with asyncio.timeout(20):
        await watcher.there.wait()
        yield watcher
    await watcher.link.close()
    await asyncio.gather(life, return_exceptions=True)


def test_over_tls_a_claim_opens_enrolment_and_a_certificate_the_rest_until_it_is_revoked(tmp_path):
    authority = Authority.init(tmp_path / "authority", "toys", ["localhost"], now=authority_cli.time.time())
    spec = BrokerSpec("toys", authority.folder)

    async def play(broker: EmbeddedBroker) -> None:
        address = Address.parse(broker.url)
        lines: asyncio.Queue[str] = asyncio.Queue()

        def enrolling(name):
            return MqttLink(address, name, tls=Tls.of(authority.folder, "enrol"))

        async with responding(authority.folder, "toys", enrolling, lines.put_nowait):
            one, other = claims(authority, broker.url, count=2)
            identity = await enroll(one, "pi-7", tmp_path / "pi-7", lines.put_nowait, patience=20)
            while "'pi-7' enrolled by" not in await lines.get():
                pass
            server = Tls.of(authority.folder, "server")
            down = ("fedge/toys/down/pi-7/msg",)
            async with connected(address, identity.tls, down) as device, connected(address, server) as speaker:
                speaker.link.publish(down[0], b"hello")
                assert await device.heard.get() == b"hello"
                # Revoked, it hears nothing any more on the connection that it has, and gets no other.
                done = CliRunner().invoke(authority_cli.revoke, ["pi-7", "-a", str(authority.folder)])
                assert done.exit_code == 0, done.output
                assert "reads its rules again" in done.output
                # The broker reads its rules when the signal has reached it.
                while (reason := await refused(address, identity.tls)) == "let in":
                    pass
                assert "revoked" in reason
                speaker.link.publish(down[0], b"secret")
                async with connected(address, server, ("fedge/toys/pub/x",)) as late:
                    speaker.link.publish("fedge/toys/pub/x", b"after it")
                    assert await late.heard.get() == b"after it"
                assert device.heard.empty()
            with pytest.raises(ConfigError, match="this key was revoked"):
                await enroll(other, "pi-8", copied(identity, tmp_path / "pi-8"), lines.put_nowait, patience=20)

    with EmbeddedBroker.start(tmp_path / "broker", kind="mosquitto", host="127.0.0.1", spec=spec) as broker:
        asyncio.run(play(broker))


def copied(identity: Identity, folder: Path) -> Path:
    """A folder with another device's key."""
    identity.key.save(folder / "device.key")
    return folder


def test_over_tls_a_claim_that_has_expired_or_is_another_federations_gets_no_connection(tmp_path):
    authority = Authority.init(tmp_path / "authority", "toys", ["localhost"], now=authority_cli.time.time())
    foreign = Authority.init(tmp_path / "foreign", "toys", ["localhost"], now=authority_cli.time.time())
    spec = BrokerSpec("toys", authority.folder)

    async def play(broker: EmbeddedBroker) -> None:
        address = Address.parse(broker.url)
        (old,) = claims(authority, broker.url, seconds=-5.0)
        with old.tls(tmp_path) as tls:
            assert "has expired" in await refused(address, tls)
        (theirs,) = claims(foreign, broker.url)
        with theirs.tls(tmp_path) as tls:
            assert "does not trust" in await refused(address, tls)
            assert "another authority" in await refused(
                address, Tls(authority.folder / "ca.crt", tls.certificate, tls.key)
            )

    with EmbeddedBroker.start(tmp_path / "broker", kind="mosquitto", host="127.0.0.1", spec=spec) as broker:
        asyncio.run(play(broker))
