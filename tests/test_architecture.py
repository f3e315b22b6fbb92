"""Imports point one way, and a device loads nothing that it does not have (design, section 2)."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("edge_client", "broker_server", "export", "deploy")

# What each room may import of the project. The longest matching prefix decides.
SHARED = {
    "edge_client.bundle",
    "edge_client.codec",
    "edge_client.errors",
    "edge_client.manifest",
    "edge_client.runtime",
    "edge_client.wire",
}
# The server measures models as a device does, and both state machines speak of the same events.
SERVER = {
    "broker_server",
    *SHARED,
    "edge_client.address",
    "edge_client.data",
    "edge_client.doctor",
    "edge_client.events",
    "edge_client.partial",
    "edge_client.reporting",
    "edge_client.terminal",
    "edge_client.tls",
    "edge_client.trainer",
    "edge_client.transport",
    "edge_client.trust",
}
ARROWS = {
    "edge_client": {"edge_client"},
    "edge_client.wire": {"edge_client.wire", "edge_client.errors"},
    "edge_client.codec": {"edge_client.codec", "edge_client.errors"},
    "broker_server": SERVER,
    # A simulation is a server and a fleet put together: only here does the server's side name the emulator.
    "broker_server.simulation": {*SERVER, "edge_client.emulator"},
    "export": {"export", *SHARED},
    # It puts devices together, and nothing imports it.
    "deploy": {"deploy", "edge_client", "broker_server"},
}

# Distributions whose import name is not their own name.
IMPORT_NAMES = {"paho-mqtt": "paho", "pillow": "PIL"}
NEVER_ON_A_DEVICE = {"torch", "PIL", "onnx", "onnxscript", "rich", "amqtt", "matplotlib", "sklearn", *ROOMS[1:]}


def modules():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(module):
    """Dotted names of everything a module imports, wherever in the module; ``from a import b`` is ``a.b``."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = [name for name in imports(module) if name.split(".")[0] in ROOMS]
    allowed = ARROWS[max((room for room in ARROWS if inside(module, room)), key=len)]
    wrong = [name for name in own if not any(inside(name, room) for room in allowed)]
    assert not wrong, f"{module} must not import {wrong}; allowed: {sorted(allowed)}"


def declared(project, extra=None):
    requirements = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    names = {re.split(r"[^A-Za-z0-9-]", requirement)[0] for requirement in requirements} - {"fedge"}
    return {IMPORT_NAMES.get(name, name) for name in names}


@pytest.mark.parametrize("room", ROOMS)
def test_third_party_imports_are_declared(room):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = declared(project)
    extras = {
        "edge_client": {"images"},
        "broker_server": {"server", "demo", "tracking"},
        "export": {"export"},
        "deploy": {"server"},
    }[room]
    known = base.union(*(declared(project, extra) for extra in extras)) | set(sys.stdlib_module_names) | set(ROOMS)
    known |= {"matplotlib", "sklearn"} if "demo" in extras else set()
    for module in MODULES:
        if not inside(module, room):
            continue
        # The emulator is no device: it shows its progress with the server's extra.
        allowed = known | (declared(project, "server") if inside(module, "edge_client.emulator") else set())
        unknown = {name.split(".")[0] for name in imports(module)} - allowed
        assert not unknown, f"{module} imports {sorted(unknown)}, which its extra does not install"


def test_what_runs_before_the_client_is_installed_needs_python_alone():
    """A card's first boot has nothing else, and runs each of these files by itself."""
    for module in (module for module in MODULES if inside(module, "deploy.firstboot")):
        assert {name.split(".")[0] for name in imports(module)} <= set(sys.stdlib_module_names), module


def test_a_device_loads_nothing_that_it_does_not_have():
    device = [module for module in MODULES if inside(module, "edge_client") and not module.endswith("__main__")]
    script = (
        "import importlib, json, sys\n"
        "guilty = {}\n"
        f"for module in {device!r}:\n"
        "    importlib.import_module(module)\n"
        f"    for name in {sorted(NEVER_ON_A_DEVICE)!r}:\n"
        "        if name in sys.modules:\n"
        "            guilty.setdefault(name, module)\n"
        "print(json.dumps(guilty))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "loaded, and by which module first"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    text = MODULES[module].read_text()
    assert text == "" or ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


def test_telemetry_is_off_before_the_runtime_loads():
    """Only edge_client.runtime imports onnxruntime: it is where its telemetry is switched off."""
    direct = {module for module in MODULES if any(inside(name, "onnxruntime") for name in imports(module))}
    # onnxruntime.quantization is pure tooling, but it loads the runtime too: such a module imports ours first.
    for module in direct - {"edge_client.runtime"}:
        names = list(imports(module))
        assert any(inside(name, "edge_client.runtime") for name in names), f"{module} must import edge_client.runtime"


def test_no_module_unpickles():
    for module in MODULES:
        assert not {name.split(".")[0] for name in imports(module)} & {"pickle", "dill", "cloudpickle"}, module
