"""A device installs the wheel with its base dependencies, and nothing of the server or the export comes along."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_ON_A_DEVICE = {"torch", "onnx", "onnxscript", "rich", "amqtt", "matplotlib", "scikit-learn"}


def run(*arguments, check=True, cwd=None):
    done = subprocess.run([str(part) for part in arguments], capture_output=True, text=True, check=False, cwd=cwd)
    assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Where the programs of a fresh environment are, into which a device's wheel was installed."""
    folder = tmp_path_factory.mktemp("install")
    # Built from a copy: setuptools leaves files in the tree, and would pack what an older build left there.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("edge_client", "broker_server", "export", "deploy"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source)
    (wheel,) = folder.glob("fedge-*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    programs = folder / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    return programs


def test_a_device_gets_no_more_than_it_needs(device):
    listed = json.loads(run(device / "python", "-m", "pip", "list", "--format", "json").stdout)
    installed = {package["name"].lower() for package in listed}
    assert {"fedge", "onnxruntime", "paho-mqtt", "cryptography"} <= installed
    assert not installed & NOT_ON_A_DEVICE


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["join", "--help"], ["enroll", "--help"], ["--version"], ["doctor"], ["flash", "--help"]],
    ids=" ".join,
)
def test_the_command_works_on_a_device(device, arguments):
    # In a folder of its own: nothing of the checkout may be importable.
    assert run(device / "fedge", *arguments, cwd=device.parent).stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve", "federation.toml"], "server"),
        (["simulate", "federation.toml"], "server"),
        (["export", "models:make"], "export"),
        (["status"], "server"),
        (["demo"], "demo"),
    ],
    ids=["serve", "simulate", "export", "status", "demo"],
)
def test_a_command_that_needs_more_says_what(device, arguments, extra):
    done = run(device / "fedge", *arguments, check=False, cwd=device.parent)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"fedge[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_lists_every_command_and_the_extra_it_needs(device):
    shown = run(device / "fedge", "--help", cwd=device.parent).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert set(project["entry-points"]["fedge.commands"]) <= listed
    assert "fedge[export]" in shown


def test_every_module_of_the_device_is_in_the_wheel_and_imports(device):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "edge_client").rglob("*.py")
        if path.stem != "__main__"
    ]
    # The emulator is the researcher's: it comes with the server's extra.
    modules = [module for module in modules if not module.startswith("edge_client.emulator")]
    script = f"import importlib\nfor module in {sorted(modules)!r}: importlib.import_module(module)"
    run(device / "python", "-I", "-c", script, cwd=device.parent)


def test_a_card_is_made_from_what_is_installed(device, tmp_path):
    """`fedge flash` finds the units, and packs the client that is here into the same wheel again."""
    script = (
        "import sys, pathlib\n"
        "from deploy.flash import boot, wheels\n"
        "print(wheels.repack('fedge', pathlib.Path(sys.argv[1])))\n"
        "print(*boot._program({}))\n"
    )
    path, files = run(device / "python", "-I", "-c", script, tmp_path, cwd=device.parent).stdout.splitlines()
    assert {"fedge/install.sh", "fedge/lib/firstboot.py", "fedge/units/fedge-enroll.service"} <= set(files.split())
    (built,) = device.parents[1].glob("fedge-*.whl")
    contents = []
    for wheel in (built, path):
        with zipfile.ZipFile(wheel) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")})
    assert contents[0] == contents[1]
