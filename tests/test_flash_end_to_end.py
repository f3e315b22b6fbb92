"""From an image and a folder of claims to a device that is enrolled: commands, a real broker, a real server.

What a Raspberry Pi does at its first boot runs here in a folder that stands for its file system.
"""

import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from broker_server.broker import find_mosquitto
from deploy.firstboot import enroll, firstboot
from deploy.flash import cli
from edge_client.trust.identity import Identity
from tests.cards import boot_files, card, needs_tools
from tests.federation import Serving, federation, fedge

pytestmark = [
    needs_tools,
    pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto"),
]


class Pi:
    """A device with a card: its first boot, and its enrolment, with what the console showed."""

    def __init__(self, folder, image):
        self.root = folder
        (folder / "etc").mkdir(parents=True)
        for name, data in boot_files(image).items():
            path = folder / "boot/firmware" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        program = folder / "opt/fedge/current/bin/fedge"
        program.parent.mkdir(parents=True)
        command = f'exec {sys.executable} -c "from edge_client.cli import main; main()" "$@"'
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)

    def boot(self, capfd):
        assert firstboot.main(["--root", str(self.root)]) == 0
        home, version = self.root / "var/lib/fedge", self.root / "boot/firmware/fedge/version"
        places = ["--config", self.root / "etc/fedge/device.toml", "--home", home, "--version-file", version]
        places += ["--program", self.root / "opt/fedge/current/bin/fedge", "--patience", "0"]
        capfd.readouterr()
        return enroll.main(list(map(str, places))), capfd.readouterr().out


def test_cards_enrol_and_a_copied_card_is_told_why_not(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    card(tmp_path / "os.img", "client")
    with federation(tmp_path) as (_, url), Serving(tmp_path) as server:
        fedge("claim", "--count", 2, "--broker", url)
        arguments = ["os.img", "--claims", "claims", "--count", "2", "-o", "cards", "--cache", "cache"]
        done = CliRunner().invoke(cli.flash, arguments)
        assert done.exit_code == 0, done.output
        first, second = Pi(tmp_path / "1", "cards/pi-1.img"), Pi(tmp_path / "2", "cards/pi-2.img")
        for number, pi in ((1, first), (2, second)):
            ended, said = pi.boot(capfd)
            assert (ended, said.splitlines()[-1]) == (0, f"fedge: pi-{number} is enrolled")
            server.until(f"enrolment: 'pi-{number}' enrolled by @claim-")
            assert Identity.load(pi.root / "var/lib/fedge/state/identity").client == f"pi-{number}"
            assert not list(pi.root.rglob("*.fedgeclaim"))
            # The next boot finds nothing to do.
            assert pi.boot(capfd) == (0, "")
        # The image of a card that was used, written to a second one.
        copied = Pi(tmp_path / "3", "cards/pi-1.img")
        ended, said = copied.boot(capfd)
        assert ended == 2
        line = said.splitlines()[-1]
        assert line.startswith("fedge: NOT ENROLLED: federation 'toys' refuses 'pi-1': the claim was used already")
        assert "Make a claim for this device with `fedge claim`" in line
        # What that line says helps: a new claim on the same card.
        shutil.rmtree(tmp_path / "claims")
        fedge("claim", "--broker", url)
        (new,) = (tmp_path / "claims").glob("*.fedgeclaim")
        os.replace(new, copied.root / "boot/firmware/fedge/claim.fedgeclaim")
        settings = copied.root / "etc/fedge/device.toml"
        settings.write_text(settings.read_text().replace("pi-1", "pi-3"))
        assert copied.boot(capfd)[0] == 0


def test_a_program_of_the_card_needs_no_more_than_python(tmp_path):
    """As the unit starts it: isolated, without what pip installed."""
    script = firstboot.__file__
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, "--root", tmp_path], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
