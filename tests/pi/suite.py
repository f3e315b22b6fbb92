"""The device's tests on aarch64, in a whole emulated machine, with the release that ships and an older ONNX Runtime."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.image.packages import PYTHON
from tests.pi.card import put_in_root
from tests.pi.machine import Machine
from tests.pi.run import Pi

ROOT = Path(__file__).parents[2]
_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "psutil", "onnx", "zstandard", "amqtt")
_ROOMS = ("tests", "broker_server", "export", "deploy")
"""Beside the client, which is the release's own."""
CHOSEN = (
    "tests/edge_client/test_trainer.py",
    "tests/edge_client/test_runtime.py",
    "tests/edge_client/test_store.py",
    "tests/edge_client/test_session.py",
    "tests/edge_client/test_bundle.py",
    "tests/edge_client/test_partial.py",
    "tests/edge_client/test_feedback.py",
    "tests/edge_client/codec",
    "tests/edge_client/wire",
    "tests/edge_client/trust",
    "tests/edge_client/service",
)
"""What depends on the processor or on the runtime, first; the rest of tests/edge_client takes hours."""
_UNIT = """\
[Unit]
Description=test: the device's tests
After=local-fs.target
[Service]
Type=oneshot
ExecStart=/bin/sh /usr/local/lib/fedge-test/suite.sh
StandardOutput=tty
TTYPath=/dev/console
TimeoutStartSec=infinity
[Install]
WantedBy=multi-user.target
"""
_SCRIPT = """\
#!/bin/sh
mkdir -p /suite && mount -o ro /dev/vda /suite || mount -o ro /dev/vdb /suite
export ORT_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 HOME=/root TMPDIR=/var/tmp
export HYPOTHESIS_STORAGE_DIRECTORY=/var/tmp/hypothesis
# Also for what tests start without this environment.
echo /suite/tools >"$(echo /opt/fedge/current/lib/python3*/site-packages)/suite.pth"
cd /suite/repo
for runtime in {runtimes}; do
    export PYTHONPATH="/suite/$runtime:/suite/tools:/suite/repo"
    echo "suite: $runtime: $(/opt/fedge/current/bin/python -c 'import onnxruntime; print(onnxruntime.__version__)')"
    /opt/fedge/current/bin/python -m pytest -p no:cacheprovider -o addopts= -q --color=no --import-mode=importlib \\
        --timeout 1800 --maxfail 20 {files} 2>&1
    echo "suite: $runtime: ended with $?"
done
echo "suite: all ended"
systemctl poweroff
"""


def oldest_runtime() -> str:
    """The oldest onnxruntime that pyproject allows."""
    found = re.search(r'"onnxruntime>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


def run_suite(image: Path, folder: Path, files: Sequence[str], log: Callable[[str], None] = print) -> dict[str, str]:
    """Run test files in a machine; by runtime (``shipped``, ``oldest``), pytest's last line."""
    folder.mkdir(parents=True)
    disk = folder / "suite.ext4"
    _write_disk(disk, folder)
    pi = Pi("virt", image, folder / "pi", 1)
    (folder / "unit").write_text(_UNIT)
    (folder / "script").write_text(_SCRIPT.format(runtimes="shipped oldest", files=" ".join(files)))
    unit = "/etc/systemd/system/fedge-suite.service"
    put_in_root(pi.card, {unit: folder / "unit", "/usr/local/lib/fedge-test/suite.sh": folder / "script"})
    found: dict[str, str] = {}
    with pi.power(disk) as machine:
        for runtime in ("shipped", "oldest"):
            log(machine.until(f"suite: {runtime}: ")[1])
            machine.until(f"suite: {runtime}: ended", seconds=7200)
            found[runtime] = _summary(machine)
            log(f"{runtime}: {found[runtime]}")
    return found


def _summary(machine: Machine) -> str:
    lines = [line for _, line in machine.lines if re.search(r"\d+ (passed|failed|error)", line)]
    return lines[-1].strip() if lines else "pytest said nothing"


def _write_disk(disk: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        tree = Path(place)
        for room in _ROOMS:
            ignored = shutil.ignore_patterns("__pycache__", "pi")
            shutil.copytree(ROOT / room, tree / "repo" / room, ignore=ignored)
        for name in ("pyproject.toml", "Makefile", "README.md"):
            shutil.copy(ROOT / name, tree / "repo")
        (tree / "shipped").mkdir()
        _install(tree / "tools", *_TOOLS)
        _install(tree / "oldest", "--no-deps", f"onnxruntime=={oldest_runtime()}.*")
        # The release's own are the ones that count.
        for name in ("numpy", "msgspec", "click", "cryptography", "cffi", "protobuf", "google"):
            for found in (tree / "tools").glob(f"{name}*"):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file()) * 13 // 10 + (64 << 20)
        disk.unlink(missing_ok=True)
        with disk.open("wb") as file:
            file.truncate(size)
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
        subprocess.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(tree), str(disk)],
            check=True,
            env=os.environ | {"PATH": path},
        )


def _install(folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "--implementation", "cp"]
    command += ["--python-version", f"{PYTHON[0]}.{PYTHON[1]}", "--only-binary", ":all:", "--no-compile"]
    for glibc in (*range(36, 16, -1), 17):
        command += ["--platform", f"manylinux_2_{glibc}_aarch64"]
    subprocess.run([*command, "--platform", "manylinux2014_aarch64", *what], check=True)
