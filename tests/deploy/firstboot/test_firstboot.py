"""The first boot takes over a card's folder, in a folder that stands for the system; the power may be cut anywhere."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.firstboot import firstboot
from deploy.flash import wheels
from tests.cards import wheel

ROOT = Path(__file__).parents[3]
CARD = """\
hostname = "pi-3"
user = "pi"
ssh_keys = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me"]
[wifi]
ssid = "Café"
country = "GB"
key = "0123"
"""
PASSWD = "root:x:0:0:root:/root:/bin/sh\npi:x:1000:1000::/home/pi:/bin/sh\n"


def sums(folder):
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(folder.glob("*.whl"))]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


@pytest.fixture
def root(tmp_path):
    """A system with a card's folder on its boot partition."""
    root = tmp_path / "model"
    card = root / "boot/firmware/fedge"
    (card / "wheels").mkdir(parents=True)
    (root / "etc/NetworkManager").mkdir(parents=True)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 raspberrypi\n")
    (card / "version").write_text("fedge 1.0\nwritten 1800000000 (2027)\n")
    (card / "device.toml").write_text('broker = "mqtts://h"\nid = "pi-3"\n')
    (card / "claim.fedgeclaim").write_text("secret " * 500)
    (card / "card.toml").write_text(CARD)
    for name in ("fedge", "pip"):
        wheel(card / "wheels", name)
    sums(card / "wheels")
    return root


def make_folder(command):
    """All that is left of venv and pip where they do not matter."""
    if "venv" in command:
        Path(command[-1]).mkdir()


def take_over(root, run=make_folder):
    firstboot.take_over(firstboot.Places(root, root / "boot/firmware/fedge"), run)


def test_the_power_may_be_cut_at_any_instant(root, tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "cuts.py", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["cuts"] > 50
    assert [name for name in found["files"] if name.startswith("boot/")] == ["boot/firmware/fedge/version"]
    assert {"opt/fedge/current", "etc/fedge/device.toml", "var/lib/fedge/claim.fedgeclaim"} <= set(found["files"])


def test_what_is_taken_over_is_in_its_place_and_nobody_elses(root):
    take_over(root)
    for name in ("etc/fedge/device.toml", "var/lib/fedge/claim.fedgeclaim"):
        assert (root / name).stat().st_mode & 0o777 == 0o600
    assert (root / "etc/hostname").read_text() == "pi-3\n"
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost\n127.0.1.1 pi-3\n"
    keys = root / "home/pi/.ssh/authorized_keys"
    assert keys.read_text() == "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me\n"
    network = root / "etc/NetworkManager/system-connections/fedge.nmconnection"
    assert network.stat().st_mode & 0o777 == 0o600
    assert {"ssid=67;97;102;195;169;", "psk=0123", "key-mgmt=wpa-psk"} <= set(network.read_text().splitlines())


def test_whose_releases_are_believed_comes_from_the_card_and_not_from_the_clients_user(root):
    card, trust = root / "boot/firmware/fedge", root / "opt/fedge/trust.json"
    said = {"federation": "toys", "pins": ["00" * 32]}
    (card / "claim.fedgeclaim").write_text(json.dumps(said | {"key": "secret"}))
    take_over(root)
    assert json.loads(trust.read_text()) == said
    assert trust.stat().st_mode & 0o777 == 0o644
    (root / "var/lib/fedge/claim.fedgeclaim").write_text(json.dumps(said | {"federation": "mine"}))
    take_over(root)
    assert json.loads(trust.read_text()) == said
    # Another card decides anew; one that is damaged leaves it.
    (card / "claim.fedgeclaim").write_text(json.dumps(said | {"federation": "others"}))
    take_over(root)
    (card / "claim.fedgeclaim").write_text("damaged")
    take_over(root)
    assert json.loads(trust.read_text()) == said | {"federation": "others"}


def test_without_networkmanager_it_is_wpa_supplicant(root):
    (root / "etc/NetworkManager").rmdir()
    take_over(root)
    lines = (root / "etc/wpa_supplicant/wpa_supplicant-wlan0.conf").read_text().splitlines()
    assert {"country=GB", "    ssid=436166c3a9", "    psk=0123"} <= set(lines)


def test_settings_that_come_later_are_taken_too_and_others_stay(root):
    take_over(root)
    card = root / "boot/firmware/fedge"
    (root / "etc/fedge/device.toml").write_text("# changed by hand\n")
    take_over(root)
    assert (root / "etc/fedge/device.toml").read_text() == "# changed by hand\n"
    (card / "claim.fedgeclaim").write_text("another")
    take_over(root)
    assert (root / "var/lib/fedge/claim.fedgeclaim").read_text() == "another"


def test_the_client_is_installed_without_a_network(root, capsys):
    """With pip from its wheel, in an environment without pip."""
    folder = root / "boot/firmware/fedge/wheels"
    for path in folder.iterdir():
        path.unlink()
    wheels.repack("pip", folder)
    wheel(folder, "other", "2.0", modules={"__init__.py": "WORD = 'yes'\n"})
    program = "import other\ndef main():\n    print('fedge runs', other.WORD)\n"
    entry = "[console_scripts]\nfedge = fedge:main\n"
    wheel(folder, "fedge", "1.5", needs=["other>=2"], modules={"__init__.py": program}, programs=entry)
    sums(folder)
    assert firstboot.main(["--root", str(root)]) == 0
    done = subprocess.run([root / "opt/fedge/current/bin/fedge"], capture_output=True, text=True, check=True)
    assert done.stdout == "fedge runs yes\n"
    assert os.readlink(root / "opt/fedge/current") == "releases/1.5"
    assert "include-system-site-packages = false" in (root / "opt/fedge/current/pyvenv.cfg").read_text()
    assert not folder.exists()
    assert "fedge 1.5 is installed" in capsys.readouterr().out


def test_a_newer_release_leaves_the_older_one_to_go_back_to(root):
    (root / "opt/fedge/releases/0.9").mkdir(parents=True)
    (root / "opt/fedge/current").symlink_to("releases/0.9")
    take_over(root)
    assert os.readlink(root / "opt/fedge/current") == "releases/1.0"
    assert os.readlink(root / "opt/fedge/previous") == "releases/0.9"


@pytest.mark.parametrize("harm", ["damaged", "missing", "no pip"])
def test_a_damaged_wheel_is_told_and_the_rest_is_done(root, capsys, harm):
    folder = root / "boot/firmware/fedge/wheels"
    (path,) = folder.glob("fedge-*")
    if harm == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "missing":
        path.unlink()
    else:
        next(folder.glob("pip-*")).unlink()
        sums(folder)
    assert firstboot.main(["--root", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fedge: FIRST BOOT FAILED: ")
    assert "write this card anew" in lines[-1]
    assert (root / "var/lib/fedge/claim.fedgeclaim").exists()
    assert not (root / "opt/fedge/current").exists()


def test_a_program_that_fails_is_told_with_its_last_words(root, capsys):
    next((root / "boot/firmware/fedge/wheels").glob("pip-*")).write_bytes(b"no zip file")
    sums(root / "boot/firmware/fedge/wheels")
    assert firstboot.main(["--root", str(root)]) == 1
    assert "ended with" in capsys.readouterr().out


def test_damaged_settings_are_told_and_left_out(root, capsys):
    (root / "boot/firmware/fedge/card.toml").write_text("hostname = ")
    take_over(root)
    assert "card.toml on the boot partition is damaged" in capsys.readouterr().out
    assert not (root / "etc/hostname").exists()
    assert (root / "etc/fedge/device.toml").exists()


def test_a_system_without_a_folder_is_left_alone(tmp_path):
    assert firstboot.main(["--root", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
