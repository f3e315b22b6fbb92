import json

import numpy as np
import onnx
import pytest
import safetensors.numpy
from click.testing import CliRunner

from broker_server import artifacts
from broker_server.artifacts import check_folder, read_report, read_tensors, write_artifacts
from broker_server.cli import deploy
from broker_server.evaluation import HeldOut
from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.errors import BundleError, CodecError, FedgeError, TrainingError
from edge_client.graphs import aligned
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan
from tests.toy import toy_bundle, toy_data

MODELS = ["infer.onnx", "infer.int8-dynamic.onnx", "infer.int8-static.onnx"]
FILES = {*MODELS, "global.safetensors", "report.json"}


@pytest.fixture(scope="module")
def bundle():
    return Bundle.from_bytes(toy_bundle(hidden=16, frozen=True))


@pytest.fixture(scope="module")
def held_out():
    return ArraySource(toy_data(400, seed=9))


@pytest.fixture(scope="module")
def vector(bundle):
    plan = TrainPlan(epochs=20, batch_size=16, hypers={"lr": 0.2})
    return Trainer(bundle).train(bundle.initial(), ArraySource(toy_data(400, seed=1)), plan, seed=1).local


def test_what_is_written(bundle, held_out, vector, tmp_path):
    folder = tmp_path / "models" / "best"
    report = write_artifacts(folder, bundle, vector, data=held_out, about={"version": 7, "round": 3})
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who may read one may read all"
    written = json.loads((folder / "report.json").read_text())
    assert written["about"] == {"version": 7, "round": 3}
    assert written["samples"] == 400
    assert [model["file"] for model in written["models"]] == MODELS
    assert all(model["bytes"] == (folder / model["file"]).stat().st_size for model in written["models"])

    assert all(model["milliseconds"]["32"] > 0 < model["milliseconds"]["1"] for model in written["models"])
    assert written["onnxruntime"] == runtime.VERSION
    assert read_report(folder) == report

    fp32, dynamic, static = (model.metrics["accuracy"] for model in report.models)
    assert fp32 == pytest.approx(HeldOut(bundle, held_out).evaluate(vector)["accuracy"])
    assert fp32 > 0.9
    assert dynamic > fp32 - 0.03
    assert static > fp32 - 0.03
    assert 0 < report.models[1].metrics["difference"] < 0.05


def test_the_model_stands_alone(bundle, held_out, vector, tmp_path):
    write_artifacts(tmp_path / "last", bundle, vector, data=held_out)
    x = held_out.arrays["x"][:5]
    tensors = artifacts.named_tensors(bundle, vector)
    constants = {f"param.{name}": aligned(tensors[name]) for name in bundle.manifest.constants["infer.onnx"]}
    (expected,) = runtime.session(bundle.infer, constants=constants).run(None, {"x": x})
    session = runtime.session((tmp_path / "last" / "infer.onnx").read_bytes())
    assert [value.name for value in session.get_inputs()] == ["x"]
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("file", MODELS[1:])
def test_the_8_bit_models_are_8_bit_and_standard(bundle, held_out, vector, tmp_path, file):
    report = write_artifacts(tmp_path / "last", bundle, vector, data=held_out)
    assert [(model.problem, model.eight_bit) for model in report.models] == [("", 0.0), ("", 1.0), ("", 1.0)]
    graph = onnx.load(tmp_path / "last" / file).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    weights = [
        value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8 and len(value.dims) == 2
    ]
    assert len(weights) == 2


def test_without_data_nothing_is_calibrated_and_times_are_measured(bundle, vector, tmp_path):
    report = write_artifacts(tmp_path / "last", bundle, vector)
    assert {path.name for path in (tmp_path / "last").iterdir()} == FILES - {MODELS[2]}
    assert report.models[2].problem == "without held-out data there is nothing to calibrate it with"
    assert all(model.milliseconds for model in report.models[:2])
    assert report.models[0].metrics == {}
    assert report.models[1].metrics.keys() == {"difference"}
    assert 0 < report.models[1].metrics["difference"] < 0.05
    assert not report.models[1].worse


def test_tensors_by_name(bundle, vector, tmp_path):
    write_artifacts(tmp_path / "last", bundle, vector)
    found = safetensors.numpy.load_file(tmp_path / "last" / "global.safetensors")
    assert found.keys() == {parameter.name for parameter in bundle.manifest.parameters}
    np.testing.assert_array_equal(bundle.layout.flatten({k: v for k, v in found.items() if k != "gain"}), vector)
    np.testing.assert_array_equal(found["gain"], bundle.weights["gain"])


def test_buffers_get_their_own_dtype():
    bundle = Bundle.from_bytes(toy_bundle(buffer=True))
    buffers = np.arange(bundle.manifest.layout("buffer").size, dtype=np.float32)
    tensors = artifacts.named_tensors(bundle, bundle.initial(), buffers)
    assert tensors["seen"].dtype == np.int64
    assert tensors["mean"].dtype == np.float32
    assert sorted(np.concatenate([tensors["seen"].ravel(), tensors["mean"].ravel()]).tolist()) == buffers.tolist()


def test_integer_pixels_are_scaled_as_on_the_device(tmp_path):
    bundle = Bundle.from_bytes(toy_bundle(scale=1 / 255))
    arrays = toy_data(200, seed=2)
    pixels = ArraySource({"x": np.clip(arrays["x"] * 60 + 128, 0, 255).astype(np.uint8), "y": arrays["y"]})
    report = write_artifacts(tmp_path / "last", bundle, bundle.initial(), data=pixels)
    expected = HeldOut(bundle, pixels).evaluate(bundle.initial())["accuracy"]
    assert report.models[0].metrics["accuracy"] == pytest.approx(expected)


def test_a_new_folder_replaces_the_old_one_and_leftovers(bundle, vector, tmp_path):
    (tmp_path / ".best.new").mkdir()
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.new" / "half").write_text("written")
    write_artifacts(tmp_path / "best", bundle, bundle.initial(), about={"version": 1})
    write_artifacts(tmp_path / "best", bundle, vector, about={"version": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert {path.name for path in (tmp_path / "best").iterdir()} == FILES - {MODELS[2]}
    assert json.loads((tmp_path / "best" / "report.json").read_text())["about"] == {"version": 2}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_that_is_no_number_leaves_the_old_folder_alone(bundle, vector, tmp_path, bad):
    write_artifacts(tmp_path / "best", bundle, vector)
    before = (tmp_path / "best" / "infer.onnx").read_bytes()
    broken = vector.copy()
    broken[3] = bad
    with pytest.raises(TrainingError, match="NaN or infinity"):
        write_artifacts(tmp_path / "best", bundle, broken)
    with pytest.raises(CodecError, match="expected float32"):
        write_artifacts(tmp_path / "best", bundle, vector[:-1])
    assert (tmp_path / "best" / "infer.onnx").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_place_that_cannot_be_written(bundle, vector, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedgeError, match="cannot be written"):
        write_artifacts(tmp_path / "file" / "best", bundle, vector)


def test_a_failed_quantization_does_not_cost_the_model(bundle, vector, tmp_path, monkeypatch):
    from onnxruntime import quantization

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("operator\nunknown")

    monkeypatch.setattr(quantization, "quantize_dynamic", fail)
    report = write_artifacts(tmp_path / "best", bundle, vector)
    assert report.models[1].problem.endswith("cannot quantize it: operator unknown")
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"infer.onnx", "global.safetensors", "report.json"}


def test_trained_weights_by_file(bundle, held_out, vector, tmp_path):
    write_artifacts(tmp_path / "last", bundle, vector, data=held_out)
    found, buffers = read_tensors(tmp_path / "last" / "global.safetensors", bundle)
    np.testing.assert_array_equal(found, vector)
    assert buffers.size == 0
    file = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"weight": np.zeros((3, 16), np.float32)}, file)
    with pytest.raises(BundleError, match="which the bundle trains; is it of another model"):
        read_tensors(file, bundle)
    safetensors.numpy.save_file({"hidden.weight": np.zeros((3, 3), np.float32)}, file)
    with pytest.raises(BundleError, match=r"'hidden.weight' is \[3, 3\], in the bundle"):
        read_tensors(file, bundle)
    file.write_text("no weights")
    with pytest.raises(BundleError, match="no safetensors file"):
        read_tensors(file, bundle)


def test_deploy_command(bundle, held_out, vector, tmp_path):
    file, data = tmp_path / "toy.fedge", tmp_path / "test.npz"
    file.write_bytes(toy_bundle(hidden=16, frozen=True))
    np.savez(data, **held_out.arrays)
    write_artifacts(tmp_path / "trained", bundle, vector)
    words = [str(file), "--weights", str(tmp_path / "trained" / "global.safetensors"), "--data", str(data)]
    output = CliRunner().invoke(deploy, [*words, "-o", str(tmp_path / "to" / "pi")], catch_exceptions=False).output
    assert {path.name for path in (tmp_path / "to" / "pi").iterdir()} == FILES
    assert f"400 held-out samples, onnxruntime {runtime.VERSION}" in output
    assert read_report(tmp_path / "to" / "pi").models[0].metrics["accuracy"] > 0.9
    assert read_report(tmp_path) is None


@pytest.mark.parametrize(("make", "message"), [("folder", "notes.txt"), ("file", "is a file")])
def test_deploy_replaces_nothing_of_others(make, message, tmp_path):
    place = tmp_path / "place"
    if make == "folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        place.write_text("mine")
    with pytest.raises(FedgeError, match=message):
        check_folder(place)
    assert (place / "notes.txt" if make == "folder" else place).read_text() == "mine"


def test_deploy_may_replace_its_own(tmp_path):
    check_folder(tmp_path / "none")
    (tmp_path / "infer.onnx").write_bytes(b"")
    check_folder(tmp_path)
