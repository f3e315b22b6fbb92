"""What is written to the boot partition for each way in which a system is set up."""

import json
import re
import subprocess
import tomllib

import pytest

from deploy.flash import boot
from deploy.flash.official import System
from deploy.flash.settings import CardSettings, Wifi

NOW = 1_800_000_000.0
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop"
WIFI = Wifi.of('Café "5"', "correct horse", "GB")
CARD = CardSettings(
    "pi-7", "mqtts://broker.example/toys", wifi=WIFI, user="op", ssh_keys=(KEY,), claim=b'{"claim": 1}\n'
)
PLAIN = CardSettings("pi-8", "mqtts://broker.example/toys")
LINE = "console=tty1 root=PARTUUID=1-02 rootwait\n"


class Partition(dict):
    """In the place of a FAT partition; the order of what was written is kept."""

    def read(self, name):
        return self.get(name)

    def remove(self, name):
        for one in [one for one in self if one.startswith(f"{name}/")]:
            del self[one]

    def write(self, files):
        for name, content in files.items():
            self.pop(name, None)
            self[name] = content


def written(kind, card=CARD, wheels=None, **files):
    partition = Partition({"cmdline.txt": LINE.encode(), "fedge/old.toml": b"x"} | files)
    boot.write(partition, System(kind, "", "3.13"), card, wheels or {}, now=NOW)
    return partition


@pytest.mark.parametrize("kind", ["firstrun", "cloud-init", "preseed", "client"])
def test_every_kind_has_settings_and_claim_and_nothing_of_before(kind):
    found = written(kind)
    assert found["fedge/device.toml"] == CARD.device_toml.encode()
    assert found["fedge/claim.fedgeclaim"] == CARD.claim
    assert found["fedge/version"].endswith(b"written 1800000000 (2027-01-15 08:00:00 UTC)\n")
    assert "fedge/old.toml" not in found
    assert ("fedge/install.sh" in found) == (kind != "client")
    assert ("fedge/card.toml" in found) == (kind in ("firstrun", "client"))
    assert not any("server" in name for name in found)


@pytest.mark.parametrize("kind", ["firstrun", "cloud-init", "preseed"])
def test_what_switches_it_on_comes_last(kind):
    names = list(written(kind))
    switch = {"firstrun": "cmdline.txt", "cloud-init": "user-data", "preseed": "rpi-preseed.toml"}[kind]
    assert names.index(switch) > names.index("fedge/device.toml") > names.index("fedge/install.sh")
    assert names[-1] == "cmdline.txt"


@pytest.mark.parametrize("kind", ["firstrun", "cloud-init", "preseed", "client"])
def test_the_command_line_stays_one_line_with_each_setting_once(kind):
    twice = written(kind)
    boot.write(twice, System(kind, "", "3.13"), CARD, {}, now=NOW)
    line = twice["cmdline.txt"].decode()
    words = line.split()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert words[:3] == LINE.split()
    assert len(words) == len({word.partition("=")[0] for word in words})
    assert "cfg80211.ieee80211_regdom=GB" in words
    assert ("cgroup_enable=memory" in words) == (kind != "client")


def test_cloud_init_is_told_all_of_it():
    found = written("cloud-init", **{"cmdline.txt": b"root=x ds=nocloud;i=rpi-imager-1\n"})
    lines = found["user-data"].decode().splitlines()
    assert lines[0] == "#cloud-config"
    for line in (
        'hostname: "pi-7"',
        '- name: "op"',
        "  lock_passwd: true",
        f'  - "{KEY}"',
        "enable_ssh: true",
        "- [sh, /boot/firmware/fedge/install.sh, now]",
    ):
        assert line in lines
    network = found["network-config"].decode().splitlines()
    assert f'        "Café \\"5\\"": {{password: "{WIFI.key}"}}' in network
    assert '      regulatory-domain: "GB"' in network
    # The instance's name is on the command line, where it counts most, once.
    instance = found["meta-data"].decode().split("instance-id: ")[1].strip()
    assert found["cmdline.txt"].decode().split()[-2] == f"ds=nocloud;i={instance}"
    assert b"rpi-imager" not in found["cmdline.txt"]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_power_cut_has_ended_of_cloud_inits_runcmd_is_gone_on_with(tmp_path, begun, whole):
    """cloud-init notes that it has run it before it runs it (`Semaphores` of its helpers.py)."""
    (line,) = re.findall(r"^bootcmd:\n- \[sh, -c, (.*)\]$", written("cloud-init")["user-data"].decode(), re.MULTILINE)
    for name, there in (
        ("var/lib/cloud/instance/sem/config_scripts_user", begun),
        ("usr/local/lib/fedge/.whole", whole),
        ("boot/firmware/fedge/install.sh", True),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        if there:
            (tmp_path / name).write_text('echo "installs $1"')
    command = re.sub(r"/(var|usr|boot)/", rf"{tmp_path}/\1/", json.loads(line))
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("installs now\n" if begun and not whole else "")


def test_another_card_is_another_instance():
    assert written("cloud-init")["meta-data"] != written("cloud-init", PLAIN)["meta-data"]
    assert written("cloud-init")["meta-data"] == written("cloud-init")["meta-data"]


def test_without_network_and_keys_nothing_is_said_of_them():
    found = written("cloud-init", PLAIN)
    assert "network-config" not in found
    assert b"ssh" not in found["user-data"].replace(b"ssh_pwauth: false", b"")
    preseed = tomllib.loads(written("preseed", PLAIN)["rpi-preseed.toml"].decode())
    assert set(preseed) == {"config_version", "system", "user", "runcmd"}
    assert "fedge/claim.fedgeclaim" not in found


def test_rpi_preseed_is_told_all_of_it():
    found = tomllib.loads(written("preseed")["rpi-preseed.toml"].decode())
    assert found["config_version"] == "1.0"
    assert found["system"] == {"hostname": "pi-7"}
    assert found["user"] == {"name": "op", "passwordless_sudo": True}
    assert found["ssh"] == {"enabled": True, "password_authentication": False, "authorized_keys": [KEY]}
    assert found["wlan"] == {
        "ssid": 'Café "5"',
        "country": "GB",
        "password": WIFI.key,
        "password_encrypted": True,
        "key_mgmt": "wpa-psk",
    }
    assert found["runcmd"]["early"] == ["sh /boot/firmware/fedge/install.sh now"]


def test_firstrun_sets_the_user_up():
    script = written("firstrun")["fedge/firstrun.sh"].decode()
    assert "/usr/lib/userconf-pi/userconf 'op' ''" in script
    assert "@" not in script


def test_wheels_and_their_list_are_on_it(tmp_path):
    wheels = {name: tmp_path / name for name in ("a.whl", "SHA256SUMS")}
    found = written("firstrun", wheels=wheels)
    assert [name for name in found if "wheels" in name] == ["fedge/wheels/a.whl", "fedge/wheels/SHA256SUMS"]
    assert "fedge/wheels/a.whl" not in written("client")


def test_an_open_network_has_no_key():
    card = CardSettings("pi-9", "mqtts://broker.example/toys", wifi=Wifi.of("open", "", "GB"))
    assert b'"open": {}' in written("cloud-init", card)["network-config"]
    assert "password" not in tomllib.loads(written("preseed", card)["rpi-preseed.toml"].decode())["wlan"]
