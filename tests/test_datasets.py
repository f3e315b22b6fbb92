import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location("fedge_datasets", Path(__file__).with_name("datasets.py"))
datasets = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(datasets)


def test_idx_files_are_read_in_their_shape(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + np.array(values.shape, ">u4").tobytes() + values.tobytes()))
    np.testing.assert_array_equal(datasets.read_idx(path), values)
    path.write_bytes(gzip.compress(b"PK\x03\x04"))
    with pytest.raises(ValueError, match="no IDX file"):
        datasets.read_idx(path)


def test_missing_data_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDGE_DATA", str(tmp_path))
    with pytest.raises(datasets.DataMissingError, match="set FEDGE_DATA"):
        datasets.images("fashion-mnist")


def test_writers_become_users(tmp_path):
    datasets.require("mnist-writers")
    digits = datasets.mnist_writers()
    assert digits.train["x"].shape == (60_000, 1, 28, 28)
    assert digits.train["x"].dtype == np.uint8
    assert len(np.unique(digits.train["user"])) == 539
    assert not np.intersect1d(digits.train["user"], digits.test["user"]).size
    train, _ = digits.write(tmp_path)
    with np.load(train) as arrays:
        assert {name: arrays[name].dtype for name in arrays} == {"x": np.uint8, "y": np.int64, "user": np.int64}


def test_speakers_become_users():
    datasets.require("tinyshakespeare")
    plays = datasets.shakespeare(40)
    for part in (plays.train, plays.test):
        assert part["x"].shape == part["y"].shape == (len(part["user"]), 40)
        np.testing.assert_array_equal(part["x"][:, 1:], part["y"][:, :-1])
        assert (part["x"].min(), part["x"].max()) == (0, 64)
        assert len(np.unique(part["user"])) == 141
    assert 0.78 < len(plays.train["x"]) / (len(plays.train["x"]) + len(plays.test["x"])) < 0.82
