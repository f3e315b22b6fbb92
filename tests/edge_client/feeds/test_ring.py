"""The ring of records: bounded, shared by writers, whole up to its last record whatever ends them, labelled later."""

import multiprocessing
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.data import DataSource
from edge_client.errors import DataError, StoreError
from edge_client.feeds import ring
from edge_client.feeds.recording import Recording
from edge_client.feeds.ring import Recorder, frames, segments
from edge_client.feeds.shards import ShardSource
from edge_client.manifest import Feature
from tests.toy import toy_bundle

MANIFEST = Bundle.from_bytes(toy_bundle()).manifest


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ring"


@pytest.fixture
def lines():
    return []


@pytest.fixture
def recording(folder, lines):
    return Recording(folder, MANIFEST, lines.append)


def found(recording, seed=None):
    recording.refresh()
    source = ShardSource(recording.shards)
    assert isinstance(source, DataSource)
    batches = list(source.batches(100_000, seed=seed))
    if not batches:
        return []
    (batch,) = batches
    assert len(batch["x"]) == source.samples
    return [(x[0].item(), y.item()) for x, y in zip(batch["x"], batch["y"], strict=True)]


def x(value):
    return np.full(4, value, np.float32)


def test_samples_come_back_as_they_were_recorded(folder, recording):
    assert found(recording) == []
    with Recorder(folder) as recorder:
        recorder.record({"x": x(1.5), "y": 2})
        recorder.record({"x": [2, 0, 0, 0.5], "y": 1})
        recorder.record({"p": 3.25, "q": 0, "r": 0, "s": 0, "y": 0})
        assert found(recording) == [(1.5, 2), (2.0, 1), (3.25, 0)]
        recorder.record({"x": x(4), "y": 1})
        assert found(recording)[3:] == [(4.0, 1)]
    assert sorted(found(recording, seed=1)) == [(1.5, 2), (2.0, 1), (3.25, 0), (4.0, 1)]


def test_labels_come_later_by_id(folder, recording, lines):
    with Recorder(folder) as recorder:
        drawn = recorder.record({"x": x(1)})
        recorder.record({"x": x(2)}, id="b")
        recorder.record({"x": x(3)}, id="never")
        recorder.record({"y": 0}, id="unknown")
        assert found(recording) == []
        recorder.record({"y": 2}, id="b")
        assert found(recording) == [(2.0, 2)]
        recorder.record({"y": 1}, id=drawn)
        assert found(recording) == [(1.0, 1), (2.0, 2)]
    assert lines == []


def test_a_label_is_for_the_last_sample_of_its_id(folder, recording):
    with Recorder(folder) as recorder:
        recorder.record({"x": x(1)}, id="a")
        recorder.record({"y": 1}, id="a")
        recorder.record({"x": x(2)}, id="a")
        assert found(recording) == [(1.0, 1)]
        recorder.record({"y": 2}, id="a")
    assert found(recording) == [(1.0, 1), (2.0, 2)]
    assert found(Recording(folder, MANIFEST, pytest.fail)) == [(1.0, 1), (2.0, 2)]


@pytest.mark.parametrize(
    "fields", [{"x": [1, 2], "y": 0}, {"x": x(1), "y": 9}, {"a": 1, "y": 0}, {"x": x(np.nan), "y": 0}]
)
def test_records_that_do_not_fit_are_left_out_and_the_first_is_named(folder, recording, lines, fields):
    with Recorder(folder) as recorder:
        recorder.record(fields)
        recorder.record(fields)
        recorder.record({"x": x(1), "y": 0})
    assert found(recording) == [(1.0, 0)]
    (line,) = lines
    assert str(folder) in line
    assert "\n" not in line


@pytest.mark.parametrize("value", ["text", [], [[1, 2], [3]], None, [1 + 2j]])
def test_what_is_no_number_is_refused(folder, value):
    with Recorder(folder) as recorder, pytest.raises(DataError, match="expected a number"):
        recorder.record({"x": value})


def test_the_ring_keeps_within_its_limit_and_keeps_the_newest(folder, recording):
    limit = 64 * 1024
    with Recorder(folder, limit=limit) as recorder:
        for number in range(5000):
            recorder.record({"x": x(number), "y": 0})
            if number % 500 == 0:
                recording.refresh()
            assert sum(path.stat().st_size for path in segments(folder)) <= limit
    kept = [int(value) for value, _ in found(recording)]
    assert kept == list(range(kept[0], 5000))
    assert len(kept) > 500
    assert found(Recording(folder, MANIFEST, pytest.fail)) == found(recording)
    with Recorder(folder, limit=limit) as recorder, pytest.raises(DataError, match="raise the ring's limit"):
        recorder.record({"x": np.zeros(limit)})


def test_labels_of_samples_that_are_gone_change_nothing(folder, recording):
    with Recorder(folder, limit=32 * 1024) as recorder:
        recorder.record({"x": x(1)}, id="a")
        recording.refresh()
        for number in range(3000):
            recorder.record({"x": x(number), "y": 0})
        recording.refresh()
        recorder.record({"y": 2}, id="a")
    assert all(label == 0 for _, label in found(recording))
    assert recording._homes == {}


def test_a_write_torn_anywhere_costs_the_last_record_alone(tmp_path):
    folder = tmp_path / "whole"
    with Recorder(folder) as recorder:
        for number in range(3):
            recorder.record({"x": x(number), "y": 0})
    (path,) = segments(folder)
    data = path.read_bytes()
    with open(path, "rb") as file:
        ends = [end for _, end in frames(file, 0)]
    for length in range(ends[-2], len(data)):
        torn = tmp_path / f"torn-{length}"
        torn.mkdir()
        (torn / path.name).write_bytes(data[:length])
        reader = Recording(torn, MANIFEST, pytest.fail)
        assert found(reader) == [(0.0, 0), (1.0, 0)]
        with Recorder(torn) as recorder:
            recorder.record({"x": x(7), "y": 1})
        assert found(reader) == found(Recording(torn, MANIFEST, pytest.fail)) == [(0.0, 0), (1.0, 0), (7.0, 1)]


@pytest.mark.parametrize("length", range(len(ring.MAGIC) + 1))
def test_a_segment_torn_at_its_beginning_is_begun_again(folder, length):
    folder.mkdir()
    (folder / "0000000001.ring").write_bytes(ring.MAGIC[:length])
    with Recorder(folder) as recorder:
        recorder.record({"x": x(7), "y": 1})
    assert found(Recording(folder, MANIFEST, pytest.fail)) == [(7.0, 1)]


def test_a_full_disk_is_one_line_and_leaves_what_was_recorded(folder, recording, monkeypatch):
    with Recorder(folder) as recorder:
        recorder.record({"x": x(1), "y": 1})
        real = os.write

        def half(file, data):
            return real(file, data[: len(data) // 2])

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", half)
            with pytest.raises(StoreError, match="No space left on device; check the disk"):
                recorder.record({"x": x(2), "y": 1})
        recorder.record({"x": x(3), "y": 1})
    assert found(recording) == [(1.0, 1), (3.0, 1)]


def write(folder, first):
    with Recorder(folder, limit=256 * 1024) as recorder:
        for number in range(first, first + 300):
            recorder.record({"x": x(number), "y": 0})


def test_several_programs_write_into_one_ring(folder, recording):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(folder, first)) for first in (0, 1000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    values = [int(value) for value, _ in found(recording)]
    assert sorted(values) == [*range(300), *range(1000, 1300)]


def test_a_killed_writer_loses_nothing_that_it_said_was_recorded(folder, recording):
    script = (
        "import sys\nfrom edge_client.feeds.ring import Recorder\n"
        f"recorder = Recorder({str(folder)!r})\n"
        "for number in range(10**9):\n"
        "    recorder.record({'x': [float(number)] * 4, 'y': 0})\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(50):
            said = int(writer.stdout.readline())
        writer.kill()
    values = [int(value) for value, _ in found(recording)]
    assert values == list(range(len(values)))
    assert len(values) > said


def test_old_samples_are_not_used(folder):
    with Recorder(folder) as recorder:
        recorder.record({"x": x(1), "y": 1})
    (path,) = segments(folder)
    changed = path.stat().st_mtime
    for seconds, expected in ((0.0, 1), (100.0, 1), (10.0, 0)):
        reader = Recording(folder, MANIFEST, pytest.fail, seconds=seconds, wall=lambda: changed + 50)
        assert len(found(reader)) == expected


def test_a_foreign_dtype_in_a_record_is_left_out(folder, recording, lines):
    folder.mkdir()
    record = ring.Record(1, 0.0, {"x": ring.Packed("|O", (4,), bytes(32)), "y": 0})
    data = msgspec.msgpack.encode(record)
    frame = ring._HEAD.pack(len(data), ring.zlib.crc32(data)) + data
    (folder / "0000000001.ring").write_bytes(ring.MAGIC + frame)
    assert found(recording) == []
    assert "left out a record" in lines[0]


def test_several_inputs_go_by_name(folder):
    manifest = msgspec.structs.replace(
        MANIFEST, inputs=(Feature("a", (2,), "float32"), Feature("b", (), "float32")), outputs=MANIFEST.outputs
    )
    with Recorder(folder) as recorder:
        recorder.record({"a": [1, 2], "b": 3.5, "y": 0})
        recorder.record({"a": [1, 2], "y": 0})
    recording = Recording(folder, manifest, pytest.fail)
    recording.refresh()
    (batch,) = ShardSource(recording.shards).batches(9, seed=None)
    assert batch["a"].tolist() == [[1, 2]]
    assert batch["b"].tolist() == [3.5]
