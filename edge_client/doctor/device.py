"""The device under a client: can it train, and will it go on doing so?"""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_client.address import Address
from edge_client.doctor.broker import reach
from edge_client.doctor.finding import Finding, Report, report
from edge_client.errors import ConfigError
from edge_client.tls import Tls

_MIB = 2**20
_MEMORY_BAD, _MEMORY_NOTE = 96 * _MIB, 256 * _MIB
"""The client needs some 120 MiB for a CNN of 1.7 million parameters; two thirds of it is the runtime."""
_DISK_BAD, _DISK_NOTE = 32 * _MIB, 512 * _MIB
_HOT = 80.0
"""Degrees Celsius from which a Raspberry Pi slows down."""
_TRIAL_SECONDS = 120.0
_ALLOWED_ERROR = 1e-3
_DAY = 86_400.0
_PAHO = (2, 2)


@dataclass(frozen=True)
class Kernel:
    """Where Linux and systemd tell about themselves."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    run: Path = Path("/run")


def examine(state: Path, broker: Address | None = None, kernel: Kernel | None = None, tls: Tls | None = None) -> Report:
    """Examine the device that this runs on; ``state`` is the folder in which it would keep its state."""
    found = _findings(state, broker, kernel or Kernel(), tls)
    return report(f"this device ({platform.node() or 'unnamed'})", found)


def _findings(state: Path, broker: Address | None, kernel: Kernel, tls: Tls | None) -> Iterator[Finding]:
    yield system()
    yield _paho()
    yield trial()
    yield _telemetry()
    yield memory(kernel)
    yield disk(state)
    yield clock(kernel)
    yield from temperature(kernel)
    if tls is not None and tls.certificate is not None and tls.certificate.name == "device.crt":
        yield identity(tls.certificate.parent)
    if broker is not None:
        yield reach(broker, tls)


def system() -> Finding:
    """Processor and Python, whose width is what counts: a 64-bit processor may well run a 32-bit system."""
    width = 64 if sys.maxsize > 2**32 else 32
    python = f"{width}-bit Python {platform.python_version()}"
    found = f"{platform.system()} on {platform.machine()}, {os.cpu_count() or 1} cores, {python}"
    if width != 64:
        return Finding("system", "bad", found, "install a 64-bit system: ONNX Runtime has no 32-bit build")
    return Finding("system", "good", found)


def _paho() -> Finding:
    try:
        found = version("paho-mqtt")
    except PackageNotFoundError:
        return Finding("paho-mqtt", "bad", "not installed", "pip install 'paho-mqtt>=2.2'")
    if tuple(int(part) for part in found.split(".")[:2]) < _PAHO:
        advice = "pip install 'paho-mqtt>=2.2': older ones never finish a large message on a slow link"
        return Finding("paho-mqtt", "bad", found, advice)
    return Finding("paho-mqtt", "good", found)


def trial(command: tuple[str, ...] = (sys.executable, "-m", "edge_client.doctor.trial")) -> Finding:
    """Take a training step in a process of its own, which may die of it."""
    name = "training step"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return Finding(name, "bad", f"not done within {_TRIAL_SECONDS:.0f} s", "look for what else uses this machine")
    if done.returncode == -signal.SIGILL:
        return Finding(
            name,
            "bad",
            "onnxruntime dies of an instruction that this processor has not got",
            "install another version: 1.21.0 does so on a Raspberry Pi 4, 1.20 and 1.24 or later do not",
        )
    if done.returncode < 0:
        return Finding(
            name, "bad", f"onnxruntime dies of {signal.Signals(-done.returncode).name}", "reinstall onnxruntime"
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1][:200]
        return Finding(name, "bad", last, "pip install --force-reinstall 'onnxruntime>=1.24'")
    told = json.loads(done.stdout)
    found = f"onnxruntime {told['version']}, {told['milliseconds']:.2f} ms"
    if not told["error"] < _ALLOWED_ERROR:
        return Finding(name, "bad", f"{found}, off by {told['error']:.1e}", "install another version of onnxruntime")
    return Finding(name, "good", found)


def _telemetry() -> Finding:
    name, value = "telemetry", os.environ.get("ORT_DISABLE_TELEMETRY")
    if value is None:
        return Finding(name, "good", "onnxruntime reports nothing: fedge sets ORT_DISABLE_TELEMETRY=1")
    if value == "1":
        return Finding(name, "good", "onnxruntime reports nothing: ORT_DISABLE_TELEMETRY is 1")
    advice = "set ORT_DISABLE_TELEMETRY=1, or onnxruntime may report to its maker"
    return Finding(name, "note", f"ORT_DISABLE_TELEMETRY is {value!r}", advice)


def memory(kernel: Kernel) -> Finding:
    """Memory that a process may still have."""
    try:
        lines = (kernel.proc / "meminfo").read_text(encoding="ascii").splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return Finding("memory", "note", "this system does not tell how much is free")
    found = f"{free / _MIB:,.0f} MiB free of {total / _MIB:,.0f}"
    if free < _MEMORY_BAD:
        return Finding("memory", "bad", found, "end other programs: a client needs about 120 MiB")
    if free < _MEMORY_NOTE:
        return Finding("memory", "note", found, "export large models with fedge export --memory-budget")
    return Finding("memory", "good", found)


def disk(state: Path) -> Finding:
    """Whether the state folder, or the nearest one above it that exists, takes files, and how many."""
    place = next(folder for folder in (state, *state.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("disk", "bad", f"{place} takes no file: {error.strerror}", "name another folder with --state")
    free = shutil.disk_usage(place).free
    found = f"{place} can be written, {free / _MIB:,.0f} MiB free"
    if free < _DISK_BAD:
        return Finding("disk", "bad", found, "make room: a client keeps the bundle, the model and an update")
    if free < _DISK_NOTE:
        return Finding("disk", "note", found, "a client keeps the bundle, two copies of the model, and an update")
    return Finding("disk", "good", found)


def clock(kernel: Kernel, now: float | None = None) -> Finding:
    """Whether the time can be true: it is not before this file was installed. Boards without a clock start anywhere."""
    now = time.time() if now is None else now
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < Path(__file__).stat().st_mtime - _DAY:
        advice = "let it be synchronised (timedatectl set-ntp true): certificates are refused until it is"
        return Finding("clock", "note", f"{found}, which is before fedge was installed here", advice)
    if not (kernel.run / "systemd" / "system").is_dir():
        return Finding("clock", "good", f"{found}; nobody here tells whether it is synchronised")
    if (kernel.run / "systemd" / "timesync" / "synchronized").exists() or _synchronised():
        return Finding("clock", "good", f"{found}, synchronised")
    return Finding("clock", "note", f"{found}, not synchronised", "timedatectl set-ntp true")


def identity(folder: Path, now: float | None = None) -> Finding:
    """Who the device is to its federation, and whether it can show it."""
    # A device that is not enrolled does not load what identities are made with.
    from edge_client.trust.enrol import warnings
    from edge_client.trust.identity import Identity

    now = time.time() if now is None else now
    try:
        found = Identity.load(folder)
    except ConfigError as error:
        return Finding("identity", "bad", str(error), "fedge enroll, with a new claim")
    said = f"{found.client} of {found.federation}, until {time.strftime('%Y-%m-%d', time.gmtime(found.expires))}"
    problem = next(warnings(found, now), None)
    if problem is not None:
        return Finding("identity", "note" if now < found.expires else "bad", said, problem)
    if found.due(now):
        return Finding("identity", "note", said, "fedge join renews it, where `fedge serve` runs with the ca.key")
    return Finding("identity", "good", said)


def _synchronised() -> bool:
    program = shutil.which("timedatectl")
    if program is None:
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [program, "show", "--property=NTPSynchronized", "--value"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603
        return done.stdout.strip() == "yes"
    return False


def temperature(kernel: Kernel) -> Iterator[Finding]:
    """The hottest sensor, where there is one."""
    degrees = []
    for path in kernel.sys.glob("class/thermal/thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            degrees.append(int(path.read_text(encoding="ascii")) / 1000)
    if degrees:
        found = f"{max(degrees):.0f} degrees Celsius"
        hot = max(degrees) >= _HOT
        advice = "cool it: a Raspberry Pi slows down from 80 degrees on" if hot else ""
        yield Finding("temperature", "note" if hot else "good", found, advice)
