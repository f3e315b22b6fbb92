"""The runtime loads only what is whole and self-contained, and shares memory instead of copying it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.errors import BundleError, TrainingError
from tests.toy import toy_bundle


def adder(weight):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "adder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def test_session_settings():
    options = runtime.session(Bundle.from_bytes(toy_bundle()).train, threads=2).get_session_options()
    assert options.intra_op_num_threads == 2
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def handed_over(location="fedge"):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    return adder(weight)


def test_constants_without_values_are_handed_over():
    given = np.array([10, 20], np.float32)
    made = runtime.session(handed_over(), constants={"w": given})
    del given
    (found,) = made.run(None, {"x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(found, [11, 21])


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"w": np.zeros(3, np.float32)},
        {"w": np.zeros(2, np.float64)},
        {"w": np.zeros(2, np.float32), "unknown": np.zeros(2, np.float32)},
    ],
)
def test_constants_that_do_not_fit_the_graph_are_a_bundle_error(constants):
    with pytest.raises(BundleError, match="export the bundle again"):
        runtime.session(handed_over(), constants=constants)


def test_a_graph_cannot_read_memory_either():
    secret = np.array([1, 2], np.float32)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", secret.ctypes.data), ("length", 8)):
        weight.external_data.add(key=key, value=str(value))
    with pytest.raises(BundleError, match="cannot load the graph"):
        runtime.session(adder(weight))


@pytest.mark.parametrize("place", ["secret", "./secret", "{folder}/secret", "../{name}/secret"])
def test_a_graph_cannot_read_files_of_the_device(tmp_path, monkeypatch, place):
    np.array([1, 2], np.float32).tofile(tmp_path / "secret")
    monkeypatch.chdir(tmp_path)
    weight = TensorProto(name="other", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=place.format(folder=tmp_path, name=tmp_path.name))
    nodes = [helper.make_node("Add", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "other"], ["y"])]
    model = onnx.load_from_string(handed_over())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(weight)
    with pytest.raises(BundleError, match=r"data in a file.*export the bundle again"):
        runtime.session(model.SerializeToString(), constants={"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize("model", [b"", b"junk", Bundle.from_bytes(toy_bundle()).train[:-50]])
def test_a_damaged_graph_is_a_bundle_error(model, capfd):
    with pytest.raises(BundleError, match=r"cannot load the graph .*export the bundle again") as caught:
        runtime.session(model)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_shared_is_shared_both_ways():
    array = np.zeros((2, 3), np.float32)
    value = runtime.shared(array[1])
    array[1] = 7
    np.testing.assert_array_equal(value.numpy(), [7, 7, 7])


def test_a_runtime_that_copies_is_refused():
    with pytest.raises(TrainingError, match="copies"):
        runtime.shared(np.zeros((4, 4), np.float32).T[::2])


@pytest.mark.parametrize(("version", "enough"), [("1.24", True), ("1.0.9", True), ("999.1", False)])
def test_at_least(version, enough):
    assert runtime.at_least(version) is enough


def test_at_least_refuses_what_is_no_version():
    with pytest.raises(BundleError, match="'newest'"):
        runtime.at_least("newest")
