"""The drop directory: whole files are taken, half-written ones wait, bad ones are named once, old ones go."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.data import DataSource
from edge_client.feeds import drop as module
from edge_client.feeds.drop import DropFolder, Retention
from edge_client.feeds.shards import ShardSource
from tests.toy import toy_bundle, toy_data

MANIFEST = Bundle.from_bytes(toy_bundle()).manifest
NOW = 1_800_000_000.0


class World:
    """A drop directory, and clocks that a test sets."""

    def __init__(self, folder, manifest=MANIFEST, **more):
        self.folder, self.lines = folder / "data", []
        self.folder.mkdir()
        self.wall, self.clock = NOW, 100.0
        self.drop = DropFolder(
            self.folder, manifest, self.lines.append, wall=lambda: self.wall, clock=lambda: self.clock, **more
        )
        self.source = ShardSource(self.drop.shards)

    def put(self, name, data=None, age=60.0, rows=10, seed=0):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        if data is not None:
            path.write_bytes(data)
        else:
            np.savez(path, **toy_data(rows, seed=seed))
        os.utime(path, (NOW - age, NOW - age))
        return path

    @property
    def samples(self):
        self.drop.refresh()
        return self.source.samples


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def rows(source, size=7, seed=None):
    return np.concatenate([batch["x"] for batch in source.batches(size, seed=seed)])


def test_a_folder_that_is_not_there_yet_has_no_samples(tmp_path):
    drop = DropFolder(tmp_path / "none", MANIFEST, pytest.fail)
    drop.refresh()
    assert ShardSource(drop.shards).samples == 0
    assert isinstance(ShardSource(drop.shards), DataSource)


def test_npz_and_csv_are_taken_together_also_from_folders(world):
    world.put("a.npz", rows=10)
    world.put("b.csv", b"p,q,r,s,y\n1,2,3,4,0\n5,6,7,8,2\n")
    world.put("camera/c.npz", rows=5, seed=1)
    assert world.samples == 17
    assert world.lines == []
    batches = list(world.source.batches(4, seed=None))
    assert [len(batch["y"]) for batch in batches] == [4, 4, 4, 4, 1]
    np.testing.assert_array_equal(batches[2]["x"][2:], [[1, 2, 3, 4], [5, 6, 7, 8]])


def test_the_seed_alone_decides_the_order_and_each_row_comes_once(world):
    for number in range(5):
        world.put(f"{number}.npz", rows=9, seed=number)
    assert world.samples == 45
    plain, one, same, other = (rows(world.source, seed=seed) for seed in (None, 1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    for found in (one, other):
        np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(plain, axis=0))


def test_little_memory_gives_the_same_rows_in_full_batches(tmp_path):
    world = World(tmp_path, memory=300)
    for number in range(6):
        world.put(f"{number}.npz", rows=5, seed=number)
    assert world.samples == 30
    sizes = [len(batch["x"]) for batch in world.source.batches(7, seed=3)]
    assert sizes == [7, 7, 7, 7, 2]
    expected = np.concatenate([toy_data(5, seed=number)["x"] for number in range(6)])
    np.testing.assert_array_equal(np.sort(rows(world.source, seed=3), axis=0), np.sort(expected, axis=0))


def test_integers_and_floats_of_one_input_are_scaled_alike(tmp_path):
    world = World(tmp_path, Bundle.from_bytes(toy_bundle(scale=0.5)).manifest)
    np.savez(world.folder / "a.npz", x=np.full((2, 4), 6, np.uint8), y=np.zeros(2, np.int64))
    np.savez(world.folder / "b.npz", x=np.full((2, 4), 3, np.float32), y=np.zeros(2, np.int64))
    for path in world.folder.iterdir():
        os.utime(path, (NOW - 60, NOW - 60))
    assert world.samples == 4
    assert set(rows(world.source, seed=0).ravel()) == {3.0}


def test_a_file_that_is_being_written_waits_until_it_is_quiet(world):
    path = world.put("a.npz", b"half", age=1)
    assert world.samples == 0
    np.savez(path, **toy_data(10))
    os.utime(path, (NOW, NOW))
    world.wall += 4
    assert world.samples == 0
    world.wall += 2
    assert world.samples == 10
    assert world.lines == []


def test_a_file_of_the_future_is_taken_when_it_has_not_changed_for_a_while(world):
    """A board whose clock is behind sees files from other machines that way."""
    world.put("a.npz", age=-86_400)
    assert world.samples == 0
    world.clock += 6
    assert world.samples == 10


@pytest.mark.parametrize("name", [".a.npz", "a.npz.part", "a.npz.tmp", "a.npz~"])
def test_names_of_unfinished_files_are_left_alone(world, name):
    (world.folder / name).write_bytes(b"half")
    os.utime(world.folder / name, (NOW - 60, NOW - 60))
    assert world.samples == 0
    assert world.lines == []


BAD = {
    "torn.npz": (b"PK\x03\x04torn", "torn.npz: is not an .npz file"),
    "text.csv": (b"a,b,c,d,y\n1,2,3,four,0\n", "text.csv: not a table of numbers"),
    "label.csv": (b"a,b,c,d,y\n1,2,3,4,9\n", "label.csv: labels 'y' run from 9 to 9"),
    "columns.csv": (b"a,b,y\n1,2,0\n", "columns.csv: 2 input columns"),
    "readme.txt": (b"hello", "readme.txt: expected .npz, .csv, or an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_once_and_tried_again_when_it_changes(world, name):
    data, expected = BAD[name]
    world.put("good.npz")
    path = world.put(name, data)
    assert [world.samples for _ in range(3)] == [10] * 3
    (line,) = world.lines
    assert expected in line
    assert "\n" not in line
    if path.suffix == ".csv":
        path.write_bytes(b"a,b,c,d,y\n1,2,3,4,0\n")
        os.utime(path, (NOW - 30, NOW - 30))
        assert world.samples == 11


def test_no_file_ends_the_client_whatever_it_does_to_those_who_read_it(world, monkeypatch):
    world.put("good.npz")
    np.savez_compressed(world.folder / "torn.npz", **toy_data(500, seed=1))
    data = bytearray((world.folder / "torn.npz").read_bytes())
    data[200:300] = bytes(byte ^ 0x55 for byte in data[200:300])
    world.put("torn.npz", bytes(data))
    assert world.samples == 10
    assert "torn.npz" in world.lines[-1]

    def swell(path, *more):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(module, "read_table", swell)
    world.put("huge.csv", b"y,a\n")
    assert world.samples == 10
    assert "huge.csv: cannot be read (MemoryError: Unable" in world.lines[-1]


def test_a_file_that_changes_is_read_anew_and_one_that_is_gone_is_forgotten(world):
    path = world.put("a.npz", rows=10)
    assert world.samples == 10
    np.savez(path, **toy_data(4, seed=9))
    os.utime(path, (NOW - 10, NOW - 10))
    assert world.samples == 4
    np.testing.assert_array_equal(rows(world.source), toy_data(4, seed=9)["x"])
    path.unlink()
    assert world.samples == 0
    assert list(world.source.batches(4, seed=0)) == []


def test_a_pass_goes_on_when_a_file_goes_under_it(tmp_path):
    world = World(tmp_path, memory=1)
    for number in range(3):
        world.put(f"{number}.npz", rows=5, seed=number)
    assert world.samples == 15
    batches = world.source.batches(5, seed=None)
    next(batches)
    (world.folder / "1.npz").unlink()
    assert [len(batch["x"]) for batch in batches] == [5]


def test_a_row_stays_on_its_side_of_the_holdout(world):
    world.put("a.npz", rows=200)
    sides = [ShardSource(world.drop.shards, part=part, holdout=0.25) for part in ("train", "test")]
    world.drop.refresh()
    train, test = (rows(side) for side in sides)
    assert 30 < len(test) < 70
    world.put("b.npz", rows=100, seed=1)
    world.drop.refresh()
    assert sum(side.samples for side in sides) == 300
    np.testing.assert_array_equal(rows(sides[1])[: len(test)], test)
    np.testing.assert_array_equal(rows(sides[0])[: len(train)], train)


def test_a_row_that_is_kept_aside_stays_so_and_is_never_one_that_is_held_out(world):
    world.put("a.npz", rows=200)
    world.drop.refresh()
    source, test = (ShardSource(world.drop.shards, part=part, holdout=0.25) for part in ("train", "test"))
    left, aside = source.apart(0.2)
    before = [rows(side) for side in (left, aside, test)]
    assert 15 < len(before[1]) < 50
    world.put("b.npz", rows=100, seed=1)
    world.drop.refresh()
    assert sum(side.samples for side in (left, aside, test)) == 300
    for side, known in zip(source.apart(0.2), before, strict=False):
        np.testing.assert_array_equal(rows(side)[: len(known)], known)


def test_data_that_is_yet_too_little_keeps_none_aside(world):
    source = ShardSource(world.drop.shards)
    assert source.apart(0.2) == (source, None)
    world.put("a.npz", rows=1)
    world.drop.refresh()
    assert source.apart(0.2) == (source, None)
    assert source.apart(0.99) == (source, None)


def test_retention_by_size_removes_the_oldest(tmp_path):
    world = World(tmp_path)
    size = world.put("probe.npz").stat().st_size
    (world.folder / "probe.npz").unlink()
    world.drop._retention = Retention(size=2 * size)
    for number in range(4):
        world.put(f"{number}.npz", age=1000 - number)
    (world.folder / "5.npz.part").write_bytes(bytes(10 * size))
    assert world.samples == 20
    assert sorted(path.name for path in world.folder.iterdir()) == ["2.npz", "3.npz", "5.npz.part"]


def test_a_file_larger_than_all_that_may_stay_takes_no_other_with_it(tmp_path):
    world = World(tmp_path)
    size = world.put("0.npz", age=1000).stat().st_size
    world.drop._retention = Retention(size=2 * size)
    world.put("1.npz", age=900)
    (world.folder / "huge.npz").write_bytes(bytes(10 * size))
    os.utime(world.folder / "huge.npz", (NOW - 1, NOW - 1))
    assert world.samples == 20  # it is being written
    os.utime(world.folder / "huge.npz", (NOW - 100, NOW - 100))
    assert world.samples == 20
    assert sorted(path.name for path in world.folder.iterdir()) == ["0.npz", "1.npz"]


def test_others_do_not_go_in_the_place_of_a_file_that_cannot_be_removed(tmp_path, monkeypatch):
    world = World(tmp_path)
    size = world.put("0.npz", age=1000).stat().st_size
    world.drop._retention = Retention(size=size)
    world.put("1.npz", age=900)
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path.name == "0.npz":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert world.samples == 20
    assert sorted(path.name for path in world.folder.iterdir()) == ["0.npz", "1.npz"]


def test_retention_by_age_waits_for_a_believable_clock(tmp_path):
    world = World(tmp_path, retention=Retention(seconds=3600))
    world.put("old.npz", age=4000)
    world.put("new.npz", age=10)
    world.wall = 3.0
    world.drop.refresh()
    assert len(list(world.folder.iterdir())) == 2
    world.wall = NOW
    assert world.samples == 10
    assert [path.name for path in world.folder.iterdir()] == ["new.npz"]


def pictures(labels=()):
    import msgspec

    from edge_client.manifest import Feature

    (target,) = MANIFEST.targets
    return msgspec.structs.replace(
        MANIFEST,
        inputs=(Feature("x", (1, 4, 6), "float32", scale=1 / 255),),
        targets=(msgspec.structs.replace(target, labels=labels),),
    )


def test_images_are_of_the_class_that_their_folder_names(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs the Python package pillow")
    world = World(tmp_path, pictures(("cat", "dog", "owl")))
    for name, grey in {"owl/1.png": 200, "cat/2.bmp": 10, "1/3.png": 50}.items():
        path = world.folder / name
        path.parent.mkdir()
        image.new("RGB", (12, 8), (grey, grey, grey)).save(path)
        os.utime(path, (NOW - 60, NOW - 60))
    world.put("cow/4.png", (world.folder / "owl/1.png").read_bytes())
    world.put("dog/5.png", b"no image")
    assert world.samples == 3
    assert len(world.lines) == 2
    assert any("folder 'cow' is no class of the bundle; expected cat, dog, owl" in line for line in world.lines)
    (batch,) = world.source.batches(8, seed=None)
    assert batch["x"].shape == (3, 1, 4, 6)
    assert batch["x"].dtype == np.uint8
    assert dict(zip(batch["y"].tolist(), batch["x"][:, 0, 0, 0].tolist(), strict=True)) == {0: 10, 1: 50, 2: 200}


def test_images_without_pillow_name_what_to_install(tmp_path, monkeypatch):
    world = World(tmp_path, pictures())
    world.put("1/a.png", b"anything")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert world.samples == 0
    assert "pip install 'fedge[images]'" in world.lines[0]
