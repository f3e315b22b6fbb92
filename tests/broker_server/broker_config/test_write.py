"""What `fedge broker config` writes: the texts that no broker here reads, and the folders."""

import os
import pwd
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from broker_server.broker_cli import broker
from broker_server.broker_config import emqx, mosquitto, nats
from broker_server.broker_config.reload import reload, reload_all
from broker_server.broker_config.spec import BrokerSpec, known
from broker_server.registry import DeviceRow, Registry
from edge_client.errors import ConfigError
from tests.certificates import Certificates

TOP = "fedge/fleet"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("fleet") / "authority")


@pytest.fixture
def spec(authority):
    return BrokerSpec("fleet", authority.folder, port=8884, devices=("pi-7", "a.b"), revoked=("gone",), user="root")


WRITERS = {
    "mosquitto": (mosquitto.write, {"mosquitto.conf", "acl"}),
    "nats": (nats.write, {"nats.conf", "users.conf"}),
    "emqx": (emqx.write, {"fedge.conf", "acl.conf"}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_has_what_the_broker_needs_and_no_key_that_makes_certificates(spec, authority, tmp_path, kind):
    (authority.folder / "ca.key").write_bytes(b"secret")
    write, own = WRITERS[kind]
    folder = tmp_path / "broker"
    path = write(folder, spec)
    # In which NATS writes.
    names = {entry.name for entry in folder.iterdir() if not entry.is_dir()}
    assert names == {*own, "ca.crt", "broker.crt", "broker.key", "crl.pem", "fedge.json"}
    assert path.name in own
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_can_be_for_another_place(spec, tmp_path, kind):
    write = WRITERS[kind][0]
    text = write(tmp_path / "here", BrokerSpec("fleet", spec.authority, place="/etc/fedge/broker")).read_text()
    assert "/etc/fedge/broker/broker.key" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_that_is_no_authority_is_named(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"nothing/ca\.crt: cannot be read .*fedge ca init"):
        WRITERS[kind][0](tmp_path / "broker", BrokerSpec("fleet", tmp_path / "nothing"))


# All that we use of mosquitto.conf(5) of 2.1.2, and nothing that it calls deprecated.
KNOWN_IN_2_1 = """
user pid_file max_packet_size max_queued_messages max_queued_bytes memory_limit max_inflight_messages
persistent_client_expiration persistence
set_tcp_nodelay sys_interval log_dest log_type connection_messages plugin_load plugin_opt_acl_file listener
cafile certfile keyfile crlfile require_certificate use_identity_as_username tls_version
listener_allow_anonymous plugin_use
"""


def options(text):
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_mosquitto_2_1_gets_its_rules_by_a_plugin_of_its_listener(spec, tmp_path):
    place = tmp_path / "b"
    old = options(mosquitto.configuration(spec, place, "2.0"))
    new = options(mosquitto.configuration(spec, place, "2.1", "/opt/lib/mosquitto_acl_file.so"))
    assert {name for name, _ in new} == set(re.findall(r"\S+", KNOWN_IN_2_1))
    own = {
        ("plugin_load", "acl /opt/lib/mosquitto_acl_file.so"),
        ("plugin_opt_acl_file", f"{place}/acl"),
        ("plugin_use", "acl"),
        ("listener_allow_anonymous", "false"),
    }
    assert set(new) - set(old) == own
    assert set(old) - set(new) == {("acl_file", f"{place}/acl"), ("allow_anonymous", "false")}
    names = [name for name, _ in new]
    # A plugin is declared before the listener that uses it, and its option belongs to the plugin before it.
    assert names.index("plugin_load") + 1 == names.index("plugin_opt_acl_file") < names.index("listener")
    assert names.index("plugin_use") > names.index("listener")
    assert names.index("listener_allow_anonymous") > names.index("listener")


def test_the_dialect_is_that_of_the_mosquitto_that_is_installed(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "mosquitto"

    def install(version):
        program.write_text(f"#!/bin/sh\necho 'mosquitto version {version}'\nexit 3\n")
        program.chmod(0o755)

    for version, dialect in (("2.0.11", "2.0"), ("2.1.2", "2.1"), ("3.0.0", "2.1")):
        install(version)
        assert mosquitto.installed_dialect() == dialect
        assert ("acl_file" in dict(options(mosquitto.write(tmp_path / "b", spec).read_text()))) == (dialect == "2.0")
    install("1.6.9")
    with pytest.raises(ConfigError, match=r"version 1\.6; expected 2\.0 or later, or say --dialect"):
        mosquitto.installed_dialect()


# Who may do what; for brokers that run here, tests/…/test_attacks.py asks themselves.
ALLOWED = [
    ("@server", "publish", f"{TOP}/pub/offer"),
    ("@server", "subscribe", f"{TOP}/up/#"),
    ("@enrol", "subscribe", f"{TOP}/enrol/+/ask"),
    ("@enrol", "publish", f"{TOP}/enrol/@claim-1/told"),
    ("@claim", "publish", f"{TOP}/enrol/@claim-1/ask"),
    ("@claim", "subscribe", f"{TOP}/enrol/@claim-1/told"),
    ("pi-7", "publish", f"{TOP}/up/pi-7/msg"),
    ("pi-7", "publish", f"{TOP}/up/pi-7/{'0' * 64}/1"),
    ("pi-7", "publish", f"{TOP}/enrol/pi-7/ask"),
    ("pi-7", "subscribe", f"{TOP}/enrol/pi-7/told"),
    ("pi-7", "subscribe", f"{TOP}/down/pi-7/msg"),
    ("pi-7", "subscribe", f"{TOP}/pub/#"),
]
DENIED = [
    ("@server", "publish", "fedge/other/pub/offer"),
    ("@enrol", "publish", f"{TOP}/pub/offer"),
    ("@enrol", "subscribe", f"{TOP}/up/#"),
    ("@claim", "subscribe", f"{TOP}/pub/#"),
    ("@claim", "subscribe", f"{TOP}/down/@claim/msg"),
    ("@claim", "publish", f"{TOP}/up/@claim/msg"),
    ("@claim", "publish", f"{TOP}/enrol/@claim-1/told"),
    ("pi-7", "publish", f"{TOP}/up/pi-8/msg"),
    ("pi-7", "publish", f"{TOP}/down/pi-7/msg"),
    ("pi-7", "publish", f"{TOP}/pub/offer"),
    ("pi-7", "publish", f"{TOP}/enrol/pi-7/told"),
    ("pi-7", "subscribe", f"{TOP}/up/#"),
    ("pi-7", "subscribe", f"{TOP}/up/pi-7/msg"),
    ("pi-7", "subscribe", f"{TOP}/down/#"),
    ("pi-7", "subscribe", f"{TOP}/+/pi-7/msg"),
    ("pi-7", "subscribe", "#"),
    ("gone", "publish", f"{TOP}/up/gone/msg"),
    ("gone", "subscribe", f"{TOP}/pub/#"),
]


def matches(topic, pattern):
    """As brokers compare a filter with a rule: the filter's wildcards are words like others."""
    said, rule = topic.split("/"), pattern.split("/")
    for index, level in enumerate(rule):
        if level == "#":
            return True
        if index >= len(said) or level not in ("+", said[index]):
            return False
    return len(said) == len(rule)


WHO = r'(?:all|\{username, (?:"([^"]+)"|\{re, "([^"]+)"\})\})'
RULE = re.compile(rf"^\{{(allow|deny), {WHO}(?:, (all|publish|subscribe), \[(.+)\])?\}}\.$")


def emqx_decides(text, user, action, topic):
    """The first rule that fits, as docs.emqx.com says of the ACL file."""
    for line in text.splitlines():
        if line.startswith("%%"):
            continue
        found = RULE.match(line)
        assert found, line
        decision, name, pattern, for_what, topics = found.groups()
        if name not in (None, user) or (pattern and not re.search(pattern, user)):
            continue
        listed = re.findall(r'"([^"]+)"', topics or '"#"')
        fits = any(matches(topic, one.replace("${username}", user)) for one in listed)
        if for_what in (None, "all", action) and fits:
            return decision == "allow"
    return False


@pytest.mark.parametrize(("user", "action", "topic"), [*ALLOWED, *DENIED])
def test_emqx_rules(spec, user, action, topic):
    assert emqx_decides(emqx.rules(spec), user, action, topic) == ((user, action, topic) in ALLOWED)


def test_emqx_takes_nobody_without_a_certificate(spec, tmp_path):
    text = emqx.configuration(spec, tmp_path)
    for line in (
        "verify = verify_peer",
        "fail_if_no_peer_cert = true",
        "peer_cert_as_username = cn",
        "no_match = deny",
    ):
        assert line in text
    assert text.count("{") == text.count("}")


def test_natss_subjects():
    cases = {
        "fedge/f/up/pi-7/msg": ["fedge.f.up.pi-7.msg"],
        "fedge/f/up/#": ["fedge.f.up", "fedge.f.up.>"],
        "fedge/f/enrol/+/ask": ["fedge.f.enrol.*.ask"],
        "fedge/f/up/a.b/#": ["fedge.f.up.a//b", "fedge.f.up.a//b.>"],
    }
    for topic, subjects in cases.items():
        assert list(nats.subjects([topic])) == subjects


def test_nats_knows_who_is_enrolled_and_nobody_else(spec):
    users = re.findall(r'user: "CN=([^"]+)"', nats.rules(spec))
    assert users == ["@server", "@enrol", "@claim", "a.b", "pi-7"]
    assert nats.rules(spec).count('allowed_connection_types: ["MQTT"]') == len(users)


def test_an_authority_knows_the_folders_that_were_written_for_it(tmp_path):
    authority = Certificates(tmp_path / "authority")
    spec = BrokerSpec("fleet", authority.folder)
    folders = [tmp_path / name for name in ("one", "two", "gone")]
    for folder in folders:
        mosquitto.write(folder, spec, "2.0")
    nats.write(folders[1], spec)
    (folders[2] / "fedge.json").unlink()
    assert known(authority.folder) == (folders[0], folders[1])
    said = reload_all(authority.folder, devices=["pi-7"], revoked=["pi-9"])
    assert [line.split(": ")[0] for line in said] == [str(folder) for folder in folders[:2]]
    assert "send it SIGHUP" in said[0]
    assert "start it anew" in said[1]
    assert "user pi-9\ntopic deny #\n" in (folders[0] / "acl").read_text()
    assert '"CN=pi-7"' in (folders[1] / "users.conf").read_text()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who gives files away")


@needs_root
@pytest.mark.parametrize("kind", WRITERS)
def test_root_gives_a_brokers_user_the_files_and_not_the_folder(tmp_path, kind):
    """In a folder of its own the user could have root give it any file."""
    authority, nobody = Certificates(tmp_path / "authority"), pwd.getpwnam("nobody").pw_uid
    folder = tmp_path / "broker"
    write, own = WRITERS[kind]
    write(folder, BrokerSpec("fleet", authority.folder, user="nobody"))
    assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (0, 0o750)
    assert {(folder / name).stat().st_uid for name in (*own, "broker.key", "crl.pem")} == {nobody}
    assert (folder / "fedge.json").stat().st_uid == 0


@needs_root
def test_root_gives_away_nothing_that_a_brokers_user_has_linked_to(tmp_path):
    authority, folder = Certificates(tmp_path / "authority"), tmp_path / "broker"
    spec = BrokerSpec("fleet", authority.folder, user="nobody")
    mosquitto.write(folder, spec, "2.0")
    secret = authority.folder / "server.key"
    os.chown(folder, pwd.getpwnam("nobody").pw_uid, 0)  # as it was before
    for name in ("evil", "broker.key.new"):
        (folder / name).symlink_to(secret)
    (folder / "acl").unlink()
    (folder / "acl").symlink_to(secret)
    before = secret.read_bytes()
    mosquitto.write(folder, spec, "2.0")
    assert (secret.stat().st_uid, secret.read_bytes()) == (0, before)
    assert folder.stat().st_uid == 0
    assert not (folder / "acl").is_symlink()


@needs_root
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_another_user_may_have_written_is_not_done_and_other_brokers_are_told(tmp_path, whose):
    authority = Certificates(tmp_path / "authority")
    spec = BrokerSpec("fleet", authority.folder)
    folders = [tmp_path / "theirs", tmp_path / "ours"]
    for folder in folders:
        mosquitto.write(folder, spec, "2.0")
    os.chown(folders[0] / ("fedge.json" if whose == "file" else ""), pwd.getpwnam("nobody").pw_uid, 0)
    with pytest.raises(ConfigError, match=r"theirs.fedge\.json can be changed by user"):
        reload_all(authority.folder, revoked=["pi-9"])
    assert ["user pi-9" in (folder / "acl").read_text() for folder in folders] == [False, True]


def test_a_reload_brings_the_new_revocation_list(tmp_path):
    authority = Certificates(tmp_path / "authority")
    mosquitto.write(tmp_path / "broker", BrokerSpec("fleet", authority.folder), "2.0")
    authority.revoke(authority.device("pi") / "device.crt")
    reload(tmp_path / "broker")
    assert (tmp_path / "broker" / "crl.pem").read_bytes() == (authority.folder / "crl.pem").read_bytes()


def test_a_process_that_only_has_a_brokers_number_gets_no_signal(tmp_path):
    authority = Certificates(tmp_path / "authority")
    mosquitto.write(tmp_path / "broker", BrokerSpec("fleet", authority.folder), "2.0")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / "broker" / "mosquitto.pid").write_text(str(stranger.pid))
        assert "copy it to where mosquitto runs" in reload(tmp_path / "broker")
        assert stranger.poll() is None
        stranger.stdin.close()
        assert stranger.wait(10) == 0


def test_a_folder_that_was_not_written_is_not_reloaded(tmp_path):
    with pytest.raises(ConfigError, match=r"fedge\.json: .*; expected a folder that `fedge broker config` wrote"):
        reload(tmp_path)
    (tmp_path / "fedge.json").write_text('{"kind": 3}')
    with pytest.raises(ConfigError, match="expected a folder"):
        reload(tmp_path)


@pytest.fixture
def fedge(monkeypatch, capsys, tmp_path):
    """Runs ``fedge broker``, which is found by the name that pyproject.toml gives it: what it prints, or its error."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        try:
            broker.main([str(one) for one in arguments], standalone_mode=False)
        except ConfigError as error:
            return str(error)
        return capsys.readouterr().err

    return run


def test_the_command_is_installed():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["fedge.commands"]["broker"] == "broker_server.broker_cli:broker"


def federation(tmp_path, authority=None):
    trust = "" if authority is None else f'[trust]\nauthority = "{authority}"\n'
    (tmp_path / "federation.toml").write_text(f'[federation]\nname = "fleet"\nbundle = "b"\n{trust}')


@pytest.mark.parametrize("kind", WRITERS)
def test_the_command_writes_a_folder_and_says_how_to_start_the_broker(fedge, authority, tmp_path, kind):
    federation(tmp_path, authority.folder)
    how = ("--user", "root", "--port", "9999", "--device", "pi-7", "--device", "pi-8")
    said = fedge("config", "--for", kind, "-o", "out", *how, "federation.toml")
    assert str(tmp_path / "out") in said
    assert any("9999" in path.read_text() for path in (tmp_path / "out").glob("*.conf"))
    if kind == "nats":
        assert '"CN=pi-8"' in (tmp_path / "out" / "users.conf").read_text()


def test_nats_is_told_who_is_enrolled_already(fedge, authority, tmp_path):
    federation(tmp_path, authority.folder)
    with Registry.create(authority.folder / "registry.db") as registry:
        registry.certify(DeviceRow("1", "pi-1", b"1" * 32, b"", 0.0, 4e9, None))
        registry.certify(DeviceRow("2", "pi-2", b"2" * 32, b"", 0.0, 4e9, None))
        registry.revoke("pi-2", 1.0)
    fedge("config", "--for", "nats", "-o", "out", "--device", "pi-3", "federation.toml")
    fedge("config", "--for", "mosquitto", "-o", "acl", "--user", "", "federation.toml")
    # Also after a device has enrolled or was revoked.
    reload(tmp_path / "out", devices=["pi-1", "pi-4"], revoked=["pi-2"])
    assert re.findall(r'"CN=(pi-\d)"', (tmp_path / "out" / "users.conf").read_text()) == ["pi-1", "pi-3", "pi-4"]
    (authority.folder / "registry.db").unlink()
    users = (tmp_path / "out" / "users.conf").read_text()
    assert [f"CN=pi-{number}" in users for number in (1, 2, 3)] == [True, False, True]
    assert "user pi-2\ntopic deny #" in (tmp_path / "acl" / "acl").read_text()


def test_mistakes_are_named(fedge, authority, tmp_path):
    federation(tmp_path)
    said = fedge("config", "--for", "mosquitto", "-o", "out", "federation.toml")
    assert "trust.authority is empty; make an authority with `fedge ca init" in said
    federation(tmp_path, authority.folder)
    said = fedge("config", "--for", "nats", "--dialect", "2.1", "-o", "out", "federation.toml")
    assert "--dialect 2.1 is mosquitto's" in said
    if os.geteuid() == 0:
        said = fedge("config", "--for", "mosquitto", "--user", "no-such", "-o", "out", "federation.toml")
        assert "cannot be given to user 'no-such'" in said
        assert "--user" in said
