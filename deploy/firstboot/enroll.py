#!/usr/bin/python3
"""Enrols this device with the claim that its card had, once its clock can be believed, as the service's own user.

Whoever looks at the console sees in one line what it waits for, and why it was refused. The claim is removed when it
has done its work. Standard library alone: it runs `fedge enroll`, which does the rest.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DAY = 86_400.0
_PATIENCE = 60.0
"""Seconds for which a clock is waited for that may be right, and that no time server has set: there may be none."""
_LOOK, _REMIND = 2.0, 300.0
"""Seconds between looks at the clock, and between lines that say what is waited for."""
_AGAIN = 60.0
"""Seconds after which enrolment is started again that has ended for no reason of the federation's."""
_REFUSED = 2
"""How `fedge` ends where something has to be changed first; this ends the same way."""


def say(line: str) -> None:
    """Tell the journal and the console, which is where the unit sends it."""
    print(f"fedge: {line}", flush=True)


@dataclass(frozen=True)
class Clock:
    """The system's clock, as far as it has to be believed."""

    floor: float
    """Seconds since 1970 that certainly have passed: when the card was written."""
    patience: float = _PATIENCE
    now: Callable[[], float] = time.time
    synchronised: Callable[[], bool] = lambda: _synchronised()
    sleep: Callable[[float], None] = time.sleep

    def wait(self) -> None:
        """Wait until the clock can be believed, and say so if that takes a while.

        A Raspberry Pi has no clock that runs without power: it starts where it stopped, or when its image was made.
        Without a time server, one that shows a time after the card was written is taken for right after a minute.
        """
        waited, told = 0.0, -_REMIND
        while True:
            late = self.now() < self.floor - _DAY
            if self.synchronised() and not late:
                return
            if not late and waited >= self.patience:
                say(f"no time server answers; going on with the clock as it is, {_shown(self.now())}")
                return
            if waited - told >= _REMIND:
                told = waited
                reason = f"this card was written at {_shown(self.floor)}" if late else "no time server has set it yet"
                say(
                    f"WAITING FOR THE CLOCK: it shows {_shown(self.now())}, and {reason}. Is the network there, and "
                    "lets NTP through? By hand: sudo timedatectl set-time 'YYYY-MM-DD hh:mm:ss'"
                )
            self.sleep(_LOOK)
            waited += _LOOK


def enroll(settings: dict[str, Any], state: Path, claim: Path, program: Path, clock: Clock) -> int:
    """Enrol; 0 where this device has an identity then or needs none, 2 where somebody has to do something first."""
    there = (state / "identity" / "device.crt").exists()
    broker, name = str(settings.get("broker", "")), str(settings.get("id", ""))
    if not claim.exists():
        if there or not broker.startswith("mqtts://"):
            return 0
        return _not_enrolled("there is no claim on this card")
    clock.wait()
    problem = _over(claim, clock.now())
    if problem and not there:
        return _not_enrolled(problem)
    command = [str(program), "enroll", str(claim), "--id", name, "--state", str(state)]
    command += ["--insecure"] if settings.get("insecure") else []
    while (ended := _follow(command))[0] not in (0, _REFUSED):
        say(f"enrolment ended unexpectedly ({ended[0]}); it is tried again in {_AGAIN:.0f} s")
        clock.sleep(_AGAIN)
    if ended[0] == _REFUSED:
        return _not_enrolled(ended[1].removeprefix("fedge: "))
    claim.unlink(missing_ok=True)
    say(f"{name} is enrolled")
    return 0


def _not_enrolled(reason: str) -> int:
    say(
        f"NOT ENROLLED: {reason}. Make a claim for this device with `fedge claim`, put it on the card's boot partition "
        "as fedge/claim.fedgeclaim, and start the device again"
    )
    return _REFUSED


def _over(claim: Path, now: float) -> str:
    """Why a claim is not even tried, by what is in it; `fedge enroll` judges the rest."""
    try:
        expires = float(json.loads(claim.read_text())["expires"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"the claim on this card was good until {_shown(expires)}" if now >= expires else ""


def _follow(command: Sequence[str]) -> tuple[int, str]:
    """Run a program and repeat what it says; how it ended, and its last line."""
    last = "it cannot be run"
    try:
        with subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                print(last, flush=True)
        return process.returncode, last
    except OSError as error:
        return _REFUSED, f"{command[0]} cannot be run ({error.strerror}): is the client installed?"


def _synchronised() -> bool:
    """Whether a time server has set the clock since this boot."""
    if Path("/run/systemd/timesync/synchronized").exists():
        return True
    try:
        done = subprocess.run(
            ["/usr/bin/timedatectl", "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "yes"


def written(version: Path) -> float:
    """When a card was written, by its ``version`` file; seconds since 1970, 0 where it does not say."""
    try:
        found = re.search(r"^written (\d{1,12})\b", version.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return 0.0
    return float(found[1]) if found else 0.0


def _shown(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, with the settings from systemd's credentials."""
    parser = argparse.ArgumentParser(description="enrol this device with the claim that its card had")
    credentials = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/etc/fedge"))
    parser.add_argument("--config", type=Path, default=credentials / "device.toml")
    parser.add_argument("--home", type=Path, default=Path("/var/lib/fedge"))
    parser.add_argument("--program", type=Path, default=Path("/opt/fedge/current/bin/fedge"))
    parser.add_argument("--version-file", type=Path, default=Path("/boot/firmware/fedge/version"))
    parser.add_argument("--patience", type=float, default=_PATIENCE, help="seconds for a time server to answer")
    told = parser.parse_args(arguments)
    try:
        settings = tomllib.loads(told.config.read_text())
    except (OSError, ValueError) as error:
        say(f"NOT ENROLLED: {told.config} cannot be read ({error}); write this card anew")
        return _REFUSED
    clock = Clock(written(told.version_file), told.patience)
    return enroll(settings, told.home / "state", told.home / "claim.fedgeclaim", told.program, clock)


if __name__ == "__main__":
    sys.exit(main())
