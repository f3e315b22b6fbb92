"""What a board tells, read from a /proc and /sys of the test's own."""

import pytest

from edge_client.feeds.drop import BELIEVABLE
from edge_client.service.board import Board, Readings, matches, resident

ROUTES = (
    "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
    "wwan0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    "eth0\t0001A8C0\t00000000\t0001\t0\t0\t50\t00FFFFFF\t0\t0\t0\n"
)


def put(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_an_empty_system_tells_nothing(tmp_path):
    assert Board(tmp_path, wall=lambda: 0.0).read() == Readings()


def test_a_raspberry_pi(tmp_path):
    put(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "51234\n",
            "sys/class/thermal/thermal_zone1/temp": "48000\n",
            "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
            "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
            "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
            "proc/meminfo": "MemTotal:  900000 kB\nMemAvailable:  102400 kB\n",
            "proc/net/route": ROUTES,
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        },
    )
    board = Board(tmp_path, wall=lambda: BELIEVABLE + 3600)
    found = board.read()
    assert (found.degrees, found.free, found.interface, found.undervoltage) == (51.234, 100 << 20, "wwan0", True)
    assert found.minute is not None
    assert 0 <= found.minute < 1440
    assert found.on_battery is None
    assert board.model() == "Raspberry Pi 4 Model B Rev 1.4"


def processors(root, user, idle, own):
    put(
        root,
        {
            "proc/stat": f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n",
            "proc/self/stat": f"12 (a) b) S 1 1 1 0 -1 0 0 0 0 0 {own} 0 0 0 20 0\n",
        },
    )


def test_what_other_programs_use_is_without_our_own(tmp_path):
    board = Board(tmp_path)
    processors(tmp_path, 1000, 1000, 500)
    assert board.read().others is None
    processors(tmp_path, 1300, 1100, 700)
    assert board.read().others == pytest.approx(0.25)
    assert board.read().others is None


SUPPLIES = {
    "mains": ({"ac/type": "Mains", "ac/online": "1"}, (False, None)),
    "laptop on mains": (
        {"ac/type": "Mains", "ac/online": "1", "b/type": "Battery", "b/status": "Charging", "b/capacity": "40"},
        (False, 40.0),
    ),
    "on battery": (
        {"ac/type": "Mains", "ac/online": "0", "b/type": "Battery", "b/status": "Discharging", "b/capacity": "70"},
        (True, 70.0),
    ),
    "a battery alone": ({"b/type": "Battery", "b/status": "Discharging", "b/capacity": "55"}, (True, 55.0)),
    "broken": ({"b/type": "Battery"}, (None, None)),
}


@pytest.mark.parametrize("name", SUPPLIES)
def test_supplies(tmp_path, name):
    files, expected = SUPPLIES[name]
    put(tmp_path / "sys/class/power_supply", files)
    found = Board(tmp_path).read()
    assert (found.on_battery, found.battery) == expected


def test_power_where_a_board_measures_it(tmp_path):
    assert Board(tmp_path).watts() is None
    put(tmp_path, {"sys/class/hwmon/hwmon0/power1_input": "4250000\n"})
    assert Board(tmp_path).watts() == 4.25


def test_interfaces_match_by_pattern():
    assert matches("wwan0", ("ppp*", "wwan*"))
    assert not matches("eth0", ("ppp*", "wwan*"))


def test_this_machine_answers():
    found = Board().read()
    assert found.free is None or found.free > 0
    assert resident() >= 0
