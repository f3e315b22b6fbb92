"""The client's unit: systemd finds nothing wrong with it, and what it starts says what systemd waits for."""

import configparser
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.service.settings import DeviceSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "fedge-client.service"
PROGRAM = [sys.executable, "-c", "from edge_client.cli import main; main()"]
NOWHERE = "mqtt://127.0.0.1:1/demo"


class Section(dict):
    """A unit's settings; those that are given several times are lists of lines."""

    def __setitem__(self, name, value):
        super().__setitem__(name, self[name] + value if name in self and isinstance(value, list) else value)


def service():
    unit = configparser.RawConfigParser(strict=False, dict_type=Section, interpolation=None)
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    return {name: value.split("\n") for name, value in unit["Service"].items()}


def limit(text):
    number, unit = re.fullmatch(r"(\d+)([MG])", text).groups()
    return int(number) << {"M": 20, "G": 30}[unit]


class Systemd:
    """Starts what the unit starts, as far as a test can: environment, credentials, limits, notifications."""

    def __init__(self, tmp_path, text, watchdog=3.0):
        self.state, credentials = tmp_path / "state", tmp_path / "credentials"
        credentials.mkdir()
        unit = service()
        name, _, source = unit["LoadCredential"][0].partition(":")
        assert source == "/etc/fedge/device.toml"
        (credentials / name).write_text(text)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(tmp_path / "notify"))
        self.socket.settimeout(60)
        command = shlex.split(unit["ExecStart"][0].replace("%d", str(credentials)))
        assert command[0] == "/opt/fedge/current/bin/fedge"
        command = [str(self.state) if word == "/var/lib/fedge/state" else word for word in command[1:]]
        environment = dict(line.split("=", 1) for line in unit["Environment"])
        assert environment["ORT_DISABLE_TELEMETRY"] == "1"
        data = limit(unit["LimitDATA"][0])
        self.process = subprocess.Popen(
            PROGRAM + command,
            stderr=subprocess.PIPE,
            text=True,
            env=environment
            | {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")}
            | {"WATCHDOG_USEC": str(int(watchdog * 1e6)), "CREDENTIALS_DIRECTORY": str(credentials)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (data, data)),
        )

    def told(self, wanted):
        while wanted not in (said := self.socket.recv(500).decode()):
            pass
        return said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.socket.close()


def test_it_is_ready_lives_and_ends_in_good_order(tmp_path):
    text = f'broker = "{NOWHERE}"\nid = "pi"\n[data]\nsource = "drop:{tmp_path / "data"}"\n'
    with Systemd(tmp_path, text) as systemd:
        assert "READY=1" in systemd.told("READY=1")
        systemd.told("WATCHDOG=1")
        systemd.told("STATUS=")
        systemd.told("WATCHDOG=1")
        systemd.process.send_signal(signal.SIGTERM)
        systemd.told("STOPPING=1")
        assert systemd.process.wait(30) == 0
        lines = systemd.process.stderr.read()
        assert lines.startswith("pi: joining 'demo' at mqtt://127.0.0.1:1")
        assert "Traceback" not in lines
        assert (systemd.state / "lock").exists()


def test_a_mistake_in_the_file_ends_it_with_one_line(tmp_path):
    with Systemd(tmp_path, 'broker = "mqtt://h"\nid = "pi"\n[training]\nhotest = 3\n') as systemd:
        assert systemd.process.wait(30) == 2
        (line,) = systemd.process.stderr.read().splitlines()
        assert line.startswith("fedge: ")
        assert "hotest" in line


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the Debian package systemd")
@pytest.mark.parametrize("path", sorted(DEPLOY.glob("systemd/*.service")), ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong(tmp_path, path):
    # Units name one another.
    for unit in DEPLOY.glob("systemd/*"):
        text = re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", unit.read_text(), flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / path.name)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the Debian package systemd")
def test_the_first_boot_fits_in_where_cloud_init_wants_a_network_early(tmp_path):
    """cloud-init runs after the network and before sysinit.target; a job of a cycle would be left out at random."""
    network = "[Unit]\nDefaultDependencies=no\nAfter=network-pre.target\nBefore=network.target\n"
    cloud = "[Unit]\nDefaultDependencies=no\nWants=network.service\nAfter=network.service\nBefore=sysinit.target\n"
    wanted = tmp_path / "multi-user.target.wants"
    wanted.mkdir()
    for unit in DEPLOY.glob("systemd/fedge-[!s]*"):
        (tmp_path / unit.name).write_text(
            re.sub(r"^(Exec\w+)=\S+", r"\1=/bin/true", unit.read_text(), flags=re.MULTILINE)
        )
        (wanted / unit.name).symlink_to(f"../{unit.name}")
    for name, text in (("network", network), ("cloud-init", cloud)):
        (tmp_path / f"{name}.service").write_text(f"{text}[Service]\nType=oneshot\nExecStart=/bin/true\n")
        (wanted / f"{name}.service").symlink_to(f"../{name}.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "multi-user.target"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert "cycle" not in done.stderr


def test_it_is_confined():
    unit = service()
    expected = {
        "Type": "notify",
        "User": "fedge",
        "Group": "fedge",
        "ProtectSystem": "strict",
        "StateDirectory": "fedge",
        "NoNewPrivileges": "yes",
    }
    assert {name: unit[name][0] for name in expected} == expected
    assert unit["WatchdogSec"][0]
    # One for kernels with the memory cgroup, one for Raspberry Pi OS, which has it switched off.
    assert limit(unit["MemoryMax"][0]) == limit(unit["LimitDATA"][0]) >= 256 << 20


def test_the_example_of_a_configuration_is_one():
    found = DeviceSettings.load(DEPLOY / "device.toml")
    assert found.options() == {
        "url": "mqtts://broker.example:8883/digits",
        "client": "pi-7",
        "data": "drop:/var/lib/fedge/data",
    }
    folder = found.data.source.partition(":")[2]
    tmpfiles = (DEPLOY / "tmpfiles.d" / "fedge.conf").read_text()
    assert re.search(rf"^d {re.escape(folder)} +2775 fedge fedge$", tmpfiles, re.MULTILINE)
