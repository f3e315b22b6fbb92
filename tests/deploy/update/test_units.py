"""The units of updates: what starts them, what they run, and that systemd finds nothing wrong."""

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.update import __file__ as package
from edge_client.service import update
from edge_client.service.settings import DeviceSettings

UNITS = sorted(Path(package).parent.glob("fedge-update.*"))


def lines(name):
    (unit,) = [path for path in UNITS if path.name == name]
    return unit.read_text().splitlines()


def test_what_the_client_stages_wakes_the_program_that_is_no_part_of_a_release():
    staged = f"/var/lib/fedge/state/release/{update.SIGNED}"
    assert f"PathChanged={staged}" in lines("fedge-update.path")
    service = lines("fedge-update.service")
    base = DeviceSettings().releases
    assert f"ExecStart=/usr/bin/python3 -I {base}/update" in service
    assert f"ReadWritePaths={base}" in service
    assert f"ConditionPathExists={base}/{update.TRUST}" in service
    # A trial that a power cut has ended is gone on with at the next start.
    assert "WantedBy=multi-user.target" in service
    assert "TimeoutStartSec=infinity" in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs the Debian package systemd")
def test_systemd_finds_nothing_wrong(tmp_path):
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text())
    names = [str(tmp_path / path.name) for path in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if "fedge-update" in line]
    assert (done.returncode, said) == (0, []), done.stderr
