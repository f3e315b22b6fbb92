import os
import subprocess
import sys
import time

import msgspec
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edge_client import cli
from edge_client.doctor import trial as trial_module
from edge_client.doctor.device import Kernel, clock, disk, examine, identity, memory, temperature, trial
from edge_client.doctor.finding import Finding
from edge_client.trust.certificate import make_request
from edge_client.trust.identity import prepare, store
from tests.nats import free_ports
from tests.office import DAY, NOW, Office


def python(code):
    return (sys.executable, "-c", code)


def test_this_machine_can_train(tmp_path):
    report = examine(tmp_path / "not" / "there" / "yet")
    assert report.works, report
    assert [finding.name for finding in report.findings][:4] == ["system", "paho-mqtt", "training step", "telemetry"]
    assert not (tmp_path / "not").exists()


def test_the_step_is_the_graph_that_it_says_it_is():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Sub", ["p", "y"], ["e"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xt", "e"], ["g"]),
        helper.make_node("Mul", ["g", "lr"], ["s"]),
        helper.make_node("Sub", ["w", "s"], ["w_new"]),
    ]
    shapes = {"x": [None, None], "y": [None, None], "w": [None, None], "lr": []}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("w_new", TensorProto.FLOAT, [None, None])]
    graph = helper.make_graph(nodes, "step", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert model.SerializeToString(deterministic=True) == trial_module.STEP
    assert trial_module.step()[0] < 1e-3


DEATHS = {
    "import os, signal; os.kill(os.getpid(), signal.SIGILL)": "an instruction that this processor has not got",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
    "import no_such_runtime": "No module named 'no_such_runtime'",
    'print(\'{"version": "9.9", "error": 0.5, "milliseconds": 1.0}\')': "off by 5.0e-01",
    'print(\'{"version": "9.9", "error": NaN, "milliseconds": 1.0}\')': "off by nan",
}


@pytest.mark.parametrize("code", DEATHS)
def test_a_runtime_that_dies_or_is_wrong_is_described_and_not_died_of(code):
    found = trial(python(code))
    assert found.level == "bad"
    assert DEATHS[code] in found.found
    assert found.advice


@pytest.mark.parametrize(("free", "level"), [(64, "bad"), (200, "note"), (2000, "good")])
def test_memory(tmp_path, free, level):
    (tmp_path / "meminfo").write_text(f"MemTotal:  4096000 kB\nMemAvailable:  {free * 1024} kB\n")
    found = memory(Kernel(proc=tmp_path))
    assert found.level == level
    assert found.found == f"{free:,} MiB free of 4,000"


def test_memory_that_nobody_tells_of_is_a_note(tmp_path):
    assert memory(Kernel(proc=tmp_path)).level == "note"


def test_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    def refuse(dir):  # noqa: A002
        raise OSError(30, "Read-only file system")

    assert disk(tmp_path).level in ("good", "note")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = disk(tmp_path / "state")
    assert (found.level, found.found) == ("bad", f"{tmp_path} takes no file: Read-only file system")


@pytest.mark.parametrize(("free", "level"), [(2**20, "bad"), (2**28, "note"), (2**33, "good")])
def test_room_on_the_disk(tmp_path, monkeypatch, free, level):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert disk(tmp_path).level == level


def test_who_the_device_is(tmp_path):
    office, folder = Office(tmp_path / "authority"), tmp_path / "identity"
    key = prepare(folder)
    certificate = office.authority.issue(make_request(key, "pi-7"), "pi-7", 30.0, now=NOW)
    store(folder, certificate, office.authority.certificate, office.authority.pins, NOW)
    assert identity(folder, NOW) == Finding("identity", "good", "pi-7 of toys, until 2027-02-14")
    due = identity(folder, NOW + 25 * DAY)
    assert (due.level, "fedge join renews it" in due.advice) == ("note", True)
    over = identity(folder, NOW + 30 * DAY)
    assert (over.level, "which is over" in over.advice) == ("bad", True)
    early = identity(folder, NOW - 30 * DAY)
    assert (early.level, "when this device was enrolled" in early.advice) == ("note", True)
    (folder / "device.key").chmod(0o644)
    assert "chmod 600" in identity(folder, NOW).found


def test_a_clock_that_started_anywhere(tmp_path, monkeypatch):
    kernel = Kernel(run=tmp_path)
    found = clock(kernel, now=86_400.0 * 365 * 50)
    assert found.level == "note"
    assert "2019-12-20" in found.found
    assert clock(kernel, now=time.time()).found.endswith("nobody here tells whether it is synchronised")
    (tmp_path / "systemd" / "system").mkdir(parents=True)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert clock(kernel).level == "note"
    assert "not synchronised" in clock(kernel).found
    (tmp_path / "systemd" / "timesync").mkdir()
    (tmp_path / "systemd" / "timesync" / "synchronized").touch()
    assert clock(kernel).level == "good"


@pytest.mark.parametrize(("degrees", "level"), [([45, 61], "good"), ([45, 84], "note"), ([], None)])
def test_the_hottest_sensor_counts(tmp_path, degrees, level):
    for number, value in enumerate(degrees):
        zone = tmp_path / "class" / "thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(f"{value * 1000}\n")
    assert [found.level for found in temperature(Kernel(sys=tmp_path))] == ([level] if level else [])


def test_telemetry_that_was_switched_on_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    report = examine(tmp_path)
    (found,) = [finding for finding in report.findings if finding.name == "telemetry"]
    assert (found.level, found.found) == ("note", "ORT_DISABLE_TELEMETRY is '0'")
    assert report.works


def test_the_command_says_it_in_lines_or_in_json_and_its_status_tells(tmp_path):
    url = f"mqtt://127.0.0.1:{free_ports(1)[0]}"
    state = ["--state", str(tmp_path)]
    alone = CliRunner().invoke(cli.doctor, state)
    assert alone.exit_code == 0, alone.output
    assert alone.output.endswith("  fedge works here.\n")
    unreachable = CliRunner().invoke(cli.doctor, [url, *state])
    assert unreachable.exit_code == 1
    assert "refused" in unreachable.output
    assert "  must: check address" in unreachable.output
    assert unreachable.output.endswith("  fedge does NOT work here.\n")
    both = CliRunner().invoke(cli.doctor, [url, "--broker", url, "--json", *state])
    assert both.exit_code == 1
    reports = msgspec.json.decode(both.output)
    assert [report["works"] for report in reports] == [False, False]
    assert reports[0]["subject"] == url
    assert {"name", "level", "found", "advice"} == set(reports[1]["findings"][0])


def test_a_processor_that_the_runtime_kills_does_not_kill_the_command(tmp_path):
    """`fedge doctor` itself loads no runtime: it could not tell what is wrong otherwise."""
    folder = tmp_path / "onnxruntime"
    folder.mkdir()
    (folder / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    root = os.path.dirname(os.path.dirname(cli.__file__))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    code = "from edge_client.cli import doctor; doctor()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "an instruction that this processor has not got" in done.stdout
