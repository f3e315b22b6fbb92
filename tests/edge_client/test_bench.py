"""`fedge bench`: it trains what it is given, and tells what a board tells."""

import json
import subprocess
import sys

import pytest

from edge_client.bench import NoiseSource, measure
from edge_client.bundle import Bundle, with_manifest
from edge_client.data import check
from edge_client.manifest import with_personal
from edge_client.service.board import Board
from tests.toy import toy_bundle

DATA = toy_bundle(hidden=8, momentum=True)
BUNDLE = Bundle.from_bytes(DATA)
PROGRAM = [sys.executable, "-c", "from edge_client.cli import main; main()", "bench"]


def test_a_bundle_with_personal_layers_is_measured_whole(tmp_path):
    data = with_manifest(toy_bundle(hidden=8), lambda manifest: with_personal(manifest, ["hidden.*"]))
    found = measure(Bundle.from_bytes(data), seconds=0.05, board=Board(tmp_path))
    assert found.parameters == Bundle.from_bytes(toy_bundle(hidden=8)).layout.size
    assert found.steps > 0


def test_noise_fits_the_bundle():
    (batch,) = NoiseSource(BUNDLE.manifest).batches(256, seed=None)
    check(batch, BUNDLE.manifest)


def test_heat_and_energy_are_told_where_the_board_tells_them(tmp_path):
    for name, text in {
        "sys/class/thermal/thermal_zone0/temp": "61000",
        "sys/class/hwmon/hwmon0/power1_input": "4000000",
        "proc/device-tree/model": "Board\0",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = measure(BUNDLE, seconds=0.2, board=Board(tmp_path))
    assert (found.board, found.degrees_before, found.degrees_hottest, found.watts) == ("Board", 61.0, 61.0, 4.0)
    assert found.steps == pytest.approx(found.steps_per_second * found.seconds)
    assert found.steps > 0
    assert found.joules_per_step == pytest.approx(4.0 / found.steps_per_second)
    assert measure(BUNDLE, seconds=0.05, board=Board(tmp_path / "none")).watts is None


def test_the_command_takes_the_bundle_of_a_client(tmp_path):
    (tmp_path / f"bundle-{BUNDLE.digest}.fedge").write_bytes(DATA)
    options = ["--state", tmp_path, "--seconds", "0.1", "--batch", "8"]
    done = subprocess.run([*PROGRAM, *options, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["bundle"], found["batch_size"], found["parameters"]) == ("toy", 8, BUNDLE.layout.size)
    assert found["peak_mib"] > 10
    done = subprocess.run([*PROGRAM, *options], capture_output=True, text=True, timeout=60)
    assert "steps/s" in done.stdout


def test_without_a_bundle_it_says_what_to_name(tmp_path):
    done = subprocess.run([*PROGRAM, "--state", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no bundle there; name one" in done.stderr
