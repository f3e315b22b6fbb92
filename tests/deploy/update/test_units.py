"""The units of updates: what starts them and what they run."""

from pathlib import Path

from deploy import __file__ as package
from edge_client.service import update
from edge_client.service.settings import DeviceSettings

UNITS = sorted(Path(package).parent.glob("systemd/fedge-update*"))


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
    assert "Restart=on-failure" in service


def test_what_runs_as_another_user_and_hangs_can_be_ended():
    """Root without CAP_KILL may not, and would wait for it for ever."""
    (bounding,) = [line for line in lines("fedge-update.service") if line.startswith("CapabilityBoundingSet=")]
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_KILL"} <= set(bounding.partition("=")[2].split())


def test_the_updater_is_copied_before_the_clients_user_has_run_anything_and_nothing_of_that_user_is_believed():
    service = lines("fedge-update-trust.service")
    base = DeviceSettings().releases
    assert f"ExecStart={base}/current/bin/python -I -m deploy.update.place" in service
    assert "Before=fedge-enroll.service fedge-client.service fedge-update.service" in service
    assert f"ConditionPathExists=!{base}/update/__main__.py" in service
    assert f"ConditionPathExists={base}/{update.TRUST}" in service
    for unit in UNITS:
        assert "/var/lib/fedge/claim" not in unit.read_text()
