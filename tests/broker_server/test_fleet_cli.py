"""`fedge fleet`: what it says, also without a server, and mistakes as one line."""

import json
import re
import time

import pytest
from click.testing import CliRunner

from broker_server import fleet_cli
from broker_server.authority import Authority
from broker_server.inventory import Inventory, Said
from broker_server.registry import Registry
from broker_server.rollout import Seat
from edge_client.errors import FedgeError
from edge_client.trust.keys import verify
from edge_client.trust.release import unseal
from edge_client.wire import messages as m
from tests.deploy.update.bench import wheel
from tests.federation import enrolled
from tests.office import Office

TOML = """\
[federation]
name = "toys"
bundle = "toy.fedge"
"""
CONDITION = m.Condition(48.2, 3 * 2**30, 2**28, 5 * 2**20, "48 degrees [red]", "cp311-aarch64")


@pytest.fixture
def fedge(tmp_path, monkeypatch):
    """Runs `fedge fleet` in the federation's folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "federation.toml").write_text(TOML)

    def run(*arguments):
        done = CliRunner().invoke(fleet_cli.fleet, list(map(str, arguments)))
        if isinstance(done.exception, FedgeError):
            raise done.exception
        assert done.exit_code == 0, done.output + repr(done.exception)
        return done.output

    return run


@pytest.fixture
def authority(tmp_path):
    Office(tmp_path / "authority").registry.close()
    (tmp_path / "federation.toml").write_text(TOML + '[trust]\nauthority = "authority"\n')
    return Authority.load(tmp_path / "authority")


@pytest.fixture
def inventory(tmp_path):
    with Inventory.open(tmp_path / "state") as found:
        found.saw({"pi-7": (time.time() - 7200, Said(12, 500, False, "0.1.0", CONDITION))})
        yield found


def test_devices_are_listed_for_people_and_for_programs(fedge, inventory):
    inventory.saw({"pi-8": (time.time() - 5, Said(13, 40, False, "0.1.0", CONDITION))})
    shown = fedge()
    for words in ("pi-7", "away", "2 h ago", "12", "500", "48", "3.22 GB", "rests: 48 degrees [red]", "s ago"):
        assert words in shown
    clock = re.compile(r"\d+ s ago *")
    assert clock.sub("", shown) == clock.sub("", fedge("federation.toml"))
    said = json.loads(fedge("--json"))
    assert said == json.loads(fedge("federation.toml", "--json"))
    row = said["devices"][0]
    assert (row["client"], row["state"], row["model_version"], row["degrees"]) == ("pi-7", "away", 12, 48.2)
    assert (row["disk"], row["written"], row["client_version"]) == (3 * 2**30, 5 * 2**20, "0.1.0")
    assert (said["paused"], said["rollout"]) == (False, None)


def test_a_fleet_that_nobody_has_seen_is_no_mistake(fedge):
    assert fedge() == "toys: no device has been seen yet\n"


def test_devices_pause_and_go_on_without_a_server(fedge, inventory):
    assert fedge("pause", "pi-7") == "pi-7 pauses\n"
    assert inventory.devices()["pi-7"].paused
    assert fedge("federation.toml", "resume", "pi-7") == "pi-7 works\n"
    assert not inventory.devices()["pi-7"].paused
    assert fedge("pause", "--all") == "every device pauses\n"
    assert inventory.everyone
    with pytest.raises(FedgeError, match="every device pauses, whatever it is called: fedge fleet resume --all"):
        fedge("resume", "pi-7")
    assert fedge("resume", "--all") == "every device works\n"
    with pytest.raises(FedgeError, match="nobody: no such devices"):
        fedge("pause", "pi-7", "nobody")
    for wrong in ((), ("pi-7", "--all")):
        with pytest.raises(FedgeError, match="name devices, or say --all"):
            fedge("pause", *wrong)


def test_who_is_retired_is_revoked_too(fedge, authority, inventory, tmp_path):
    enrolled(authority, tmp_path / "identity", "pi-9", time.time())
    assert "never seen" in fedge()
    said = fedge("retire", "pi-9")
    assert "pi-9 is revoked" in said
    assert "pi-9 is retired: nothing is asked of it any more" in said
    with Registry.open(authority.folder / "registry.db") as registry:
        assert registry.device("pi-9").revoked is not None
    assert fedge("retire", "pi-7") == "pi-7 is retired: nothing is asked of it any more\n"
    with pytest.raises(FedgeError, match="'nobody' is no device of this fleet"):
        fedge("retire", "nobody")
    states = {row["client"]: row["state"] for row in json.loads(fedge("--json"))["devices"]}
    assert states == {"pi-7": "retired", "pi-9": "retired"}


def test_a_release_is_signed_and_waits_for_the_server(fedge, authority, inventory, tmp_path):
    made = wheel(tmp_path / "wheels", "0.2.0")
    numpy = made.with_name("numpy-2.4.6-cp313-cp313-manylinux_2_28_aarch64.whl")
    numpy.write_bytes(made.read_bytes())
    said = fedge("update", tmp_path / "wheels", "--waves", "1,100%", "--downgrade", "--valid", "2")
    assert "release 0.2.0: 2 wheels" in said
    assert "devices with cp311-aarch64 do not get it: no wheel of numpy fits cp311-aarch64" in said
    _, rollout = inventory.latest()
    assert (rollout.waves, rollout.failing, rollout.patience, rollout.state) == (("1", "100%"), 0.1, 1800.0, "running")
    pin = authority.signing.public
    record = unseal(rollout.release, "toys", lambda data, signature: verify(pin, data, signature))
    assert (record.version, record.back, record.pins) == ("0.2.0", True, (pin,))
    assert record.expires - record.issued == 2 * 86_400
    for file in record.files:
        copied = tmp_path / "state" / "releases" / file.blob.sha256.hex()
        assert copied.read_bytes() == (tmp_path / "wheels" / file.name).read_bytes()
    inventory.keep(1, rollout, {"pi-7": Seat(0, "failed", 1.0, "deaf")})
    assert "release 0.2.0: wave 1 of 2; 1 failed" in fedge()
    assert json.loads(fedge("--json"))["rollout"]["devices"] == {
        "pi-7": {"wave": 1, "state": "failed", "reason": "deaf"}
    }
    assert fedge("halt") == "release 0.2.0: nobody else is asked\n"
    assert inventory.latest()[1].state == "stopped"
    with pytest.raises(FedgeError, match="no rollout is under way"):
        fedge("halt")
    fedge("update", wheel(tmp_path / "newer", "0.3.0"))
    assert len(list((tmp_path / "state" / "releases").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("wheels", "--waves", "all"), "--waves 'all'"),
        (("wheels", "--failing", "2"), "--failing is a share"),
        (("wheels", "--valid", "0"), "above 0"),
        (("none",), "has none of fedge"),
        (("wheels", "other"), "has fedge 0.1.9, 0.2.0; expected wheels of one version"),
        (("torn",), "is no wheel"),
    ],
)
def test_what_is_no_release_is_refused_before_anything_is_signed(
    fedge, authority, inventory, tmp_path, arguments, problem
):
    wheel(tmp_path / "wheels", "0.2.0")
    wheel(tmp_path / "other", "0.1.9")
    (tmp_path / "none").mkdir()
    wheel(tmp_path / "torn", "0.2.0").write_bytes(b"half of")
    with pytest.raises(FedgeError, match=problem):
        fedge("update", *arguments)
    assert inventory.latest() is None


def test_a_federation_without_keys_releases_nothing(fedge, inventory, tmp_path):
    wheel(tmp_path / "wheels", "0.2.0")
    with pytest.raises(FedgeError, match=r"set trust\.authority"):
        fedge("update", "wheels")
