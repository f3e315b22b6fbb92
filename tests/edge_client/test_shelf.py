"""The model for other programs: always one version, whole, whatever happens while it is replaced or read."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from edge_client import shelf as module
from edge_client.bundle import Bundle
from edge_client.codec.model import Model
from edge_client.errors import BundleError, DataError, StoreError
from edge_client.manifest import Feature
from edge_client.predict import Model as Predictor
from edge_client.shelf import Description, Shelf
from tests.edge_client.codec.conftest import coded
from tests.toy import toy_bundle, toy_data

BUNDLE = Bundle.from_bytes(toy_bundle(frozen=True, buffer=True))
BUFFERS = BUNDLE.initial_buffers()
X = toy_data(100)["x"]


def model(*seeds):
    return Model(coded(BUNDLE.layout, *seeds), BUFFERS)


def expected(version, x=X):
    flat = version.parameters(BUNDLE.initial())
    w = {tensor.name: flat[where].reshape(tensor.shape) for tensor, where in BUNDLE.layout.slices()}
    return (x * BUNDLE.weights["gain"]) @ w["weight"].T + w["bias"]


def test_a_model_predicts_as_its_weights_say(tmp_path):
    Shelf(tmp_path / "model").put(BUNDLE, model(1, 2), 7)
    for path in (tmp_path, tmp_path / "model", tmp_path / "model" / "current"):
        opened = Predictor.open(path)
        assert opened.version == 7
        np.testing.assert_allclose(opened.predict(x=X)["logits"], expected(model(1, 2)), rtol=1e-5, atol=1e-5)
    assert opened.classes(x=X) == [str(best) for best in expected(model(1, 2)).argmax(1)]


def test_a_newer_version_replaces_it_and_who_has_the_old_one_keeps_it(tmp_path):
    shelf = Shelf(tmp_path)
    for version in range(1, 6):
        shelf.put(BUNDLE, model(version), version)
    old = Predictor.open(tmp_path)
    shelf.put(BUNDLE, model(9), 9)
    np.testing.assert_allclose(old.predict(x=X)["logits"], expected(model(5)), rtol=1e-5, atol=1e-5)
    assert Predictor.open(tmp_path).version == 9
    assert len([path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()]) == 2


def test_the_same_version_is_not_written_again(tmp_path):
    written = []
    shelf = Shelf(tmp_path, wrote=written.append)
    shelf.put(BUNDLE, model(1), 1)
    assert sum(written) == sum(path.stat().st_size for path in (tmp_path / "current").iterdir())
    count = len(written)
    shelf.put(BUNDLE, model(1), 1)
    Shelf(tmp_path, wrote=written.append).put(BUNDLE, model(1), 1)
    assert len(written) == count


def test_a_version_stays_for_as_long_as_it_is_told_to(tmp_path):
    now = [0.0]
    shelf = Shelf(tmp_path, pause=60.0, clock=lambda: now[0])
    for moment, version, current in ((0.0, 1, 1), (59.0, 2, 1), (60.0, 3, 3), (61.0, 4, 3)):
        now[0] = moment
        shelf.put(BUNDLE, model(version), version)
        assert Predictor.open(tmp_path).version == current


def test_a_version_that_had_to_wait_is_written_later(tmp_path):
    now = [0.0]
    shelf = Shelf(tmp_path, pause=60.0, clock=lambda: now[0])
    for version in (1, 2, 3):
        shelf.put(BUNDLE, model(version), version)
    shelf.catch_up()
    assert Predictor.open(tmp_path).version == 1
    now[0] = 60.0
    shelf.catch_up()
    assert Predictor.open(tmp_path).version == 3
    shelf.put(BUNDLE, model(4), 4)
    shelf.catch_up(now=True)
    assert Predictor.open(tmp_path).version == 4


def test_a_power_cut_at_any_operation_leaves_a_whole_version(tmp_path, monkeypatch):
    class PowerCut(BaseException):
        pass

    for after in range(40):
        folder = tmp_path / str(after)
        Shelf(folder).put(BUNDLE, model(1), 1)
        left = [after]

        def guarded(real, left=left):
            def call(*arguments, **more):
                left[0] -= 1
                if left[0] < 0:
                    raise PowerCut
                return real(*arguments, **more)

            return call

        with monkeypatch.context() as patched:
            for name in ("replace", "fsync", "mkdir", "symlink", "unlink", "rmdir"):
                patched.setattr(os, name, guarded(getattr(os, name)))
            patched.setattr(module, "open", guarded(open), raising=False)
            try:
                Shelf(folder).put(BUNDLE, model(2), 2)
                done = True
            except PowerCut:
                done = False
        opened = Predictor.open(folder)
        np.testing.assert_allclose(opened.predict(x=X)["logits"], expected(model(opened.version)), rtol=1e-5, atol=1e-5)
        Shelf(folder).put(BUNDLE, model(3), 3)
        assert Predictor.open(folder).version == 3
        assert len(list(folder.iterdir())) <= 3
        if done:
            assert after > 8
            return
    pytest.fail("the operations did not end")


def test_readers_never_see_half_a_version(tmp_path):
    shelf = Shelf(tmp_path, durable=False)
    shelf.put(BUNDLE, model(1), 1)
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            opened = Predictor.open(tmp_path)
            off = np.abs(opened.predict(x=X)["logits"] - expected(model(opened.version))).max()
            seen.append((opened.version, off))

    reader = threading.Thread(target=read)
    reader.start()
    for version in range(2, 60):
        shelf.put(BUNDLE, model(version), version)
    stop.set()
    reader.join(30)
    assert seen
    assert max(off for _, off in seen) < 1e-4


def test_a_full_disk_leaves_the_version_before(tmp_path, monkeypatch):
    Shelf(tmp_path).put(BUNDLE, model(1), 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device"):
            Shelf(tmp_path).put(BUNDLE, model(2), 2)
    assert Predictor.open(tmp_path).version == 1


def test_there_is_none_yet(tmp_path):
    with pytest.raises(BundleError, match="no model yet"):
        Predictor.open(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "infer.onnx", "model.json"])
def test_a_damaged_version_is_one_line(tmp_path, name):
    Shelf(tmp_path).put(BUNDLE, model(1), 1)
    (tmp_path / "current" / name).write_bytes(b"damaged")
    with pytest.raises(BundleError) as caught:
        Predictor.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, b"", b"damaged", b'{"version":1,"digest":"\xff"}'])
def test_a_description_that_cannot_be_read_is_of_nothing_that_was_fine_tuned(tmp_path, data):
    shelf = Shelf(tmp_path)
    shelf.put(BUNDLE, model(1), 1)
    description = tmp_path / "current" / "model.json"
    if data is None:
        description.unlink()
    else:
        description.write_bytes(data)
    assert not shelf.tuned(BUNDLE)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((2, 5))}, r"expected float32"),
        ({"x": np.zeros((0, 4))}, "no samp"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path, inputs, expected):
    Shelf(tmp_path).put(BUNDLE, model(1), 1)
    with pytest.raises(DataError, match=expected):
        Predictor.open(tmp_path).predict(**inputs)


def test_classes_are_found_where_the_bundle_has_them(tmp_path):
    """PyTorch has them first where there are several targets for a sample."""
    scores = np.zeros((2, 3, 4), np.float32)
    scores[0, 2, :], scores[1, 1, 3] = 1.0, 1.0
    wanted = ["2", "2", "2", "2", "0", "0", "0", "1"]
    for array in (scores, scores.transpose(0, 2, 1)):
        output, target = Feature("logits", array.shape[1:], "float32"), Feature("y", (4,), "int64")
        about = Description(1, "", "", "toy", (Feature("x", (1,), "float32"),), (output,), (target,), ())

        session = SimpleNamespace(get_outputs=[output].copy, run=lambda names, fed, found=array: [found])
        assert Predictor(about, tmp_path, session).classes(x=np.zeros((2, 1))) == wanted


def test_the_command_prints_a_class_for_each_sample(tmp_path):
    Shelf(tmp_path / "model").put(BUNDLE, model(1), 3)
    np.savez(tmp_path / "in.npz", x=X)
    # As for training: the target's column is none of the input's.
    labelled = np.column_stack([np.full(len(X), 1.0), X])
    np.savetxt(tmp_path / "in.csv", labelled, delimiter=",", header="y,a,b,c,d", comments="", fmt="%.9g")
    classes = [str(best) for best in expected(model(1)).argmax(1)]
    program = [sys.executable, "-c", "from edge_client.cli import main; main()"]
    for name in ("in.npz", "in.csv"):
        done = subprocess.run(
            [*program, "predict", tmp_path / name, "--model", tmp_path, "-o", tmp_path / "out.npz"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "version 3 of 'toy'\n")
        assert done.stdout.split() == classes
        np.testing.assert_allclose(np.load(tmp_path / "out.npz")["logits"], expected(model(1)), rtol=1e-5, atol=1e-5)
