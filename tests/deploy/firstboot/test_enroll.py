"""What a device does with its claim: when it waits, what it says, what it leaves."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.firstboot.enroll import Clock, enroll, main, written

NOW = 1_800_000_000.0
SETTINGS = {"broker": "mqtts://broker.example/toys", "id": "pi-1"}


@dataclass
class Time:
    """A clock that a time server sets after a while, or never."""

    shows: float = NOW
    set_after: float = 0.0
    right: float = NOW
    slept: float = 0.0
    floor: float = NOW - 3600

    def sleep(self, seconds):
        self.slept += seconds
        self.shows = self.right if self.slept >= self.set_after else self.shows + seconds

    def clock(self):
        return Clock(self.floor, 60.0, lambda: self.shows, lambda: self.slept >= self.set_after, self.sleep)


@dataclass
class Home:
    """A device's state and claim, and a program in the place of ``fedge``."""

    folder: Path
    time: Time = field(default_factory=Time)

    def __post_init__(self):
        self.claim, self.state = self.folder / "claim.fedgeclaim", self.folder / "state"
        self.claim.write_text(json.dumps({"expires": NOW + 1000}))
        self.program("echo 'pi-1 is enrolled in toys'")

    def program(self, text):
        path = self.folder / "fedge"
        path.write_text(f'#!/bin/sh\necho "$*" >>{self.folder}/asked\n{text}\n')
        path.chmod(0o755)

    def run(self, **settings):
        return enroll(SETTINGS | settings, self.state, self.claim, self.folder / "fedge", self.time.clock())

    @property
    def asked(self):
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def test_the_claim_is_used_and_removed(home, capsys):
    assert home.run() == 0
    assert home.asked == [f"enroll {home.claim} --id pi-1 --state {home.state}"]
    assert not home.claim.exists()
    assert capsys.readouterr().out == "pi-1 is enrolled in toys\nfedge: pi-1 is enrolled\n"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("fedge: federation 'toys' refuses 'pi-1': the claim was used already, with another key", "used already"),
        ("fedge: claim.fedgeclaim: it was changed, or is damaged", "damaged"),
    ],
)
def test_a_refusal_is_one_clear_line_and_the_claim_stays(home, capsys, said, reason):
    home.program(f'echo "{said}" >&2; exit 2')
    assert home.run() == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("fedge: NOT ENROLLED: ")
    assert reason in line
    assert "fedge claim" in line
    assert home.claim.exists()


def test_an_expired_claim_is_told_without_asking(home, capsys):
    home.claim.write_text(json.dumps({"expires": NOW - 1}))
    assert home.run() == 2
    assert "NOT ENROLLED: the claim on this card was good until 2027-01-15" in capsys.readouterr().out
    assert home.asked == []


def test_a_device_without_claim_is_told_unless_it_needs_none(home, capsys):
    home.claim.unlink()
    assert home.run() == 2
    assert "there is no claim on this card" in capsys.readouterr().out
    assert home.run(broker="mqtt://192.0.2.1/toys", insecure=True) == 0
    (home.state / "identity").mkdir(parents=True)
    (home.state / "identity" / "device.crt").touch()
    assert home.run() == 0
    assert home.asked == []


def test_a_clock_that_was_set_is_not_waited_for(home):
    assert home.run() == 0
    assert home.time.slept == 0


def test_an_impossible_clock_is_waited_for_and_said_once_in_a_while(home, capsys):
    home.time = Time(shows=NOW - 10**8, set_after=700)
    assert home.run() == 0
    assert home.time.slept == 700
    lines = [line for line in capsys.readouterr().out.splitlines() if "WAITING FOR THE CLOCK" in line]
    assert len(lines) == 3
    assert "it shows 2023-11-14 22:13 UTC" in lines[0]
    assert "this card was written at 2027-01-15" in lines[0]


def test_a_clock_set_wrongly_by_a_time_server_is_waited_for_too(home):
    home.time = Time(shows=NOW - 10**8, right=NOW - 10**8, set_after=0)
    home.time.sleep = lambda seconds: (_ for _ in ()).throw(TimeoutError)
    with pytest.raises(TimeoutError):
        home.run()


def test_without_a_time_server_a_possible_clock_is_taken_after_a_minute(home, capsys):
    home.time = Time(set_after=10**9)
    assert home.run() == 0
    assert home.time.slept == 60
    assert "no time server answers; going on" in capsys.readouterr().out


def test_enrolment_that_ends_by_a_signal_is_started_again(home):
    home.program(f'[ "$(wc -l <{home.folder}/asked)" -ge 3 ] || kill -9 $$')
    assert home.run() == 0
    assert len(home.asked) == 3


def test_a_client_that_is_not_installed_is_told(home, capsys):
    (home.folder / "fedge").unlink()
    assert home.run() == 2
    assert "is the client installed?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "moment"), [("fedge 1.0\nwritten 1800000000 (2027-01-15)\n", NOW), ("fedge 1.0\n", 0.0), ("\0" * 40, 0.0)]
)
def test_when_the_card_was_written(tmp_path, text, moment):
    (tmp_path / "version").write_text(text)
    assert written(tmp_path / "version") == moment
    assert written(tmp_path / "nothing") == 0.0


def test_it_runs_with_the_standard_library_alone(home):
    (home.folder / "device.toml").write_text('broker = "mqtts://broker.example/toys"\nid = "pi-1"\n')
    home.claim.write_text(json.dumps({"expires": 4e9}))
    script = Path(__file__).parents[3] / "deploy" / "firstboot" / "enroll.py"
    arguments = [
        "--patience",
        "0",
        "--home",
        home.folder,
        "--program",
        home.folder / "fedge",
        "--version-file",
        home.folder / "version",
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, *arguments],
        env=os.environ | {"CREDENTIALS_DIRECTORY": str(home.folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fedge: pi-1 is enrolled\n")


def test_damaged_settings_are_told(tmp_path, capsys):
    (tmp_path / "device.toml").write_text("id = ")
    assert main(["--config", str(tmp_path / "device.toml"), "--home", str(tmp_path)]) == 2
    assert "NOT ENROLLED" in capsys.readouterr().out
