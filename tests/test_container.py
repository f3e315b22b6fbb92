"""The container's file, without an engine: what it copies exists, what it runs works, what it starts is a client."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deploy" / "Dockerfile"


def stages():
    """The instructions of each stage, as pairs of a name and what follows it."""
    found = []
    for line in FILE.read_text().replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith("#"):
            continue
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


BUILD, IMAGE = stages()


def lines(stage, wanted):
    return [rest for name, rest in stage if name == wanted]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Runs the stage that builds, in a folder that stands for the file system."""
    root = tmp_path_factory.mktemp("container")
    source = root / "source"
    source.mkdir()
    for line in lines(BUILD, "COPY"):
        *names, target = line.split()
        for name in names:
            place = source / (name if target == "./" else target)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, place)
    # What fedge depends on is installed here already.
    environment = os.environ | {"PIP_NO_DEPS": "1"}
    environment.pop("PYTHONPATH", None)
    for line in lines(BUILD, "RUN"):
        command = line.replace("/opt/fedge", str(root / "opt")).replace("python3", sys.executable, 1)
        done = subprocess.run(["sh", "-ec", command], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        (packages,) = (root / "opt" / "lib").glob("python*/site-packages")
        (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def test_the_image_is_for_arm64_and_amd64():
    for stage in (BUILD, IMAGE):
        ((_, base), *_) = stage
        # An official image of that tag is for both; a digest or a platform would tie it to one.
        assert base.split()[0] == "python:3.13-slim-bookworm"


def test_what_is_copied_exists_and_is_let_through():
    allowed = {line[1:] for line in Path(f"{FILE}.dockerignore").read_text().splitlines() if line.startswith("!")}
    names = {name for line in lines(BUILD, "COPY") for name in line.split()[:-1]}
    assert names == allowed
    assert all((ROOT / name).exists() for name in names)
    assert lines(IMAGE, "COPY") == ["--from=build /opt/fedge /opt/fedge"]


def test_it_runs_as_a_user_of_its_own_without_telemetry():
    assert lines(IMAGE, "USER") == ["fedge"]
    (made,) = lines(IMAGE, "RUN")
    words = shlex.split(made)
    assert words[0] == "groupadd"
    assert words[-1] == words[words.index("&&") - 1] == "fedge"
    (settings,) = lines(IMAGE, "ENV")
    assert "ORT_DISABLE_TELEMETRY=1" in settings.split()


def test_what_it_starts_is_a_client_that_ends_in_good_order(built, tmp_path):
    (entry,), (command,) = lines(IMAGE, "ENTRYPOINT"), lines(IMAGE, "CMD")
    (tmp_path / "device.toml").write_text(
        'broker = "mqtt://127.0.0.1:1/demo"\nid = "pi"\n[data]\nsource = "drop:none"\n'
    )
    words = [
        word.replace("/opt/fedge", str(built / "opt"))
        .replace("/etc/fedge", str(tmp_path))
        .replace("/var/lib/fedge", str(tmp_path))
        for word in json.loads(entry) + json.loads(command)
    ]
    (settings,) = lines(IMAGE, "ENV")
    environment = {"PATH": os.defpath} | dict(pair.split("=") for pair in settings.split())
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as client:
        assert client.stderr.readline() == "pi: joining 'demo' at mqtt://127.0.0.1:1\n"
        assert "refused" in client.stderr.readline()
        client.send_signal(signal.SIGTERM)
        assert client.wait(30) == 0
        assert "Traceback" not in client.stderr.read()
