"""The scripts that put the first boot's programs into a system: right at once, again, and after a cut anywhere."""

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.flash import boot
from deploy.flash.official import System
from deploy.flash.settings import CardSettings
from tests.cards import COMMAND_LINE

SCRIPTS = Path(__file__).parents[3] / "deploy" / "firstboot"
UNITS = ("fedge-firstboot.service", "fedge-enroll.service", "fedge-client.service")


class Written:
    """In the place of a FAT partition: a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "cmdline.txt").write_text(COMMAND_LINE)

    def read(self, name):
        return (self.folder / name).read_bytes()

    def remove(self, name):
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def write(self, files):
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())


@pytest.fixture
def card(tmp_path):
    """A boot partition that was prepared to be started by firstrun.sh."""
    written = Written(tmp_path / "boot")
    settings = CardSettings("pi-1", "mqtts://broker.example/toys")
    boot.write(written, System("firstrun", "", "3.11"), settings, {}, now=1_800_000_000.0)
    return written.folder


@pytest.fixture
def tools(tmp_path):
    """Programs in the place of those that wait for the disk or talk to systemd; each notes that it ran."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def tool(name, text):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/ran\n{text}\n')
        (folder / name).chmod(0o755)

    tool("sync", "exit 0")
    tool("systemctl", "exit 0")
    return tool


def start(script, tmp_path, *arguments):
    environment = {"PATH": f"{tmp_path}/tools:{os.defpath}", "ROOT": str(tmp_path / "root")}
    return subprocess.run(["sh", script, *arguments], env=environment, capture_output=True, text=True)


def state(root):
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_programs_units_and_settings_are_put_in_place_and_switched_on(card, tools, tmp_path):
    done = start(card / "fedge/install.sh", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = state(tmp_path / "root")
    for name in ("firstboot.py", "enroll.py"):
        assert found[f"usr/local/lib/fedge/{name}"] == (SCRIPTS / name).read_bytes()
    wanted = [name for name in found if name.startswith("etc/systemd/system/multi-user.target.wants/")]
    assert {Path(name).name for name in wanted} >= set(UNITS)
    for name in wanted:
        assert (tmp_path / "root" / name).resolve() == tmp_path / "root/etc/systemd/system" / Path(name).name
    assert {"etc/sysusers.d/fedge.conf", "etc/tmpfiles.d/fedge.conf", "etc/systemd/journald.conf.d/fedge.conf"} <= set(
        found
    )
    assert not any("fedge-server" in name or ".new" in name for name in found)
    assert "usr/local/lib/fedge/.whole" in found
    for unit in UNITS:
        parsed = configparser.RawConfigParser(strict=False)
        parsed.read_string(found[f"etc/systemd/system/{unit}"].decode())
        command = parsed["Service"]["ExecStart"].split()
        if command[0] == "/usr/bin/python3":
            assert command[1].lstrip("/") in found


def test_a_unit_may_be_wanted_by_several_or_by_none(card, tools, tmp_path):
    (card / "fedge/units/fedge-two.path").write_text("[Install]\nWantedBy=paths.target multi-user.target\n")
    (card / "fedge/units/fedge-none.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert start(card / "fedge/install.sh", tmp_path, "now").returncode == 0
    links = {name for name in state(tmp_path / "root") if ".wants/" in name}
    assert {f"etc/systemd/system/{name}.target.wants/fedge-two.path" for name in ("paths", "multi-user")} <= links
    assert not any("fedge-none" in name for name in links)
    started = (tmp_path / "ran").read_text().splitlines()[-1].split()
    assert ("fedge-two.path" in started, "fedge-none.service" in started) == (True, False)


def test_now_starts_it(card, tools, tmp_path):
    assert start(card / "fedge/install.sh", tmp_path, "now").returncode == 0
    lines = (tmp_path / "ran").read_text().splitlines()
    assert "systemctl daemon-reload" in lines
    assert lines[-1].startswith("systemctl start --no-block")
    assert set(UNITS) <= set(lines[-1].split())


def test_the_power_may_be_cut_at_any_of_its_commands(card, tools, tmp_path):
    """Each cut is a command that kills the shell; what is there then under its own name is whole."""
    root = tmp_path / "root"
    start(card / "fedge/install.sh", tmp_path)
    wanted = state(root)
    count = (tmp_path / "ran").read_text().count("sync")
    for name in ("sync", "mv", "ln"):
        real = shutil.which(name)
        for limit in range(1, count + 1, 3):
            shutil.rmtree(root)
            (tmp_path / "ran").unlink()
            tools(name, f'[ "$(grep -c "^{name}" {tmp_path}/ran)" -ge {limit} ] && kill -9 $PPID; exec {real} "$@"')
            start(card / "fedge/install.sh", tmp_path)
            if root.exists():
                assert {
                    name: text for name, text in state(root).items() if "/.new-" not in name
                }.items() <= wanted.items()
            tools(name, f'exec {real} "$@"' if name != "sync" else "exit 0")
            assert start(card / "fedge/install.sh", tmp_path).returncode == 0
            assert state(root) == wanted


def test_firstrun_installs_and_takes_itself_from_the_command_line(card, tools, tmp_path):
    before = (card / "cmdline.txt").read_text()
    assert "systemd.run=/boot/firmware/fedge/firstrun.sh systemd.run_success_action=reboot" in before
    assert "systemd.unit=kernel-command-line.target" in before
    assert start(card / "fedge/firstrun.sh", tmp_path).returncode == 0
    assert (tmp_path / "root/usr/local/lib/fedge/firstboot.py").exists()
    after = (card / "cmdline.txt").read_text()
    assert after.split() == [*COMMAND_LINE.split(), "cgroup_enable=memory"]
    assert after.count("\n") == 1
    assert not (card / "cmdline.new").exists()


def test_what_cannot_be_installed_lets_the_system_boot(card, tools, tmp_path):
    (card / "fedge/install.sh").write_text("exit 1\n")
    assert start(card / "fedge/firstrun.sh", tmp_path).returncode == 0
    assert "systemd" not in (card / "cmdline.txt").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs the Debian package shellcheck")
@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(["shellcheck", "-s", "sh", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
