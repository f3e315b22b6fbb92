"""`fedge record`: lines of a pipe and calls of a function become samples; what is none is named once."""

import os
import signal
import subprocess
import sys

import pytest

from edge_client.bundle import Bundle
from edge_client.feeds.recording import Recording
from edge_client.feeds.shards import ShardSource
from tests.toy import toy_bundle

MANIFEST = Bundle.from_bytes(toy_bundle()).manifest
COMMAND = [sys.executable, "-c", "from edge_client.cli import main; main()", "record"]


def recorded(folder):
    recording = Recording(folder, MANIFEST, pytest.fail)
    recording.refresh()
    return [
        (x[0].item(), y.item())
        for batch in ShardSource(recording.shards).batches(100, seed=None)
        for x, y in zip(batch["x"], batch["y"], strict=True)
    ]


def run(tmp_path, text, *options):
    return subprocess.run(
        [*COMMAND, str(tmp_path / "ring"), *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )


def test_json_lines_with_labels_that_come_later(tmp_path):
    done = run(
        tmp_path,
        '{"id": 17, "x": [1, 0, 0, 0]}\n{"x": [2.5, 0, 0, 0], "y": 1}\n\n'
        '{"id": 17, "y": 2}\nno json\n[1]\n{"x": "a"}\n',
    )
    assert done.returncode == 0
    assert recorded(tmp_path / "ring") == [(1.0, 2), (2.5, 1)]
    first, last = done.stderr.splitlines()
    assert first.startswith("skipped: line 5: ")
    assert last.startswith("3 records into ")
    assert last.endswith(", 3 skipped")


def test_csv_rows_whose_empty_cells_are_not_known_yet(tmp_path):
    text = "id,a,b,c,d,y\nu,1,2,3,4,\nv,5,6,7,8,0\nu,,,,,2\nw,1\n"
    done = run(tmp_path, text, "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "ring") == [(1.0, 2), (5.0, 0)]
    assert "line 5: 2 cells below a header of 6" in done.stderr


def test_a_function_is_called_until_it_stops(tmp_path):
    (tmp_path / "sensor.py").write_text(
        "rows = iter([{'x': [1.0] * 4, 'y': 1}, None, 3, {'x': [2.0] * 4, 'y': 2}])\n"
        "def read():\n    return next(rows)\n"
    )
    done = run(tmp_path, "", "--call", "sensor:read", "--every", "0")
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path / "ring") == [(1.0, 1), (2.0, 2)]
    assert "sensor:read returned int; expected a mapping" in done.stderr
    assert "2 records" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(tmp_path, number):
    with subprocess.Popen(
        [*COMMAND, str(tmp_path / "ring")], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        writer.stdin.write('{"x": [1, 0, 0, 0], "y": 1}\nnot a record\n')
        writer.stdin.flush()
        assert writer.stderr.readline().startswith("skipped: line 2")
        writer.send_signal(number)
        assert writer.wait(15) == 0
        assert writer.stderr.read() == f"1 records into {tmp_path / 'ring'}, 1 skipped\n"
    assert recorded(tmp_path / "ring") == [(1.0, 1)]


@pytest.mark.parametrize(
    ("options", "expected"), [(["--sync", "-1"], "--sync -1.0"), (["--call", "none:none"], "--call 'none:none'")]
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, options, expected):
    done = run(tmp_path, "", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("fedge: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
