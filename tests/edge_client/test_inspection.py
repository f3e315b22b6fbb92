"""Graphs that a device refuses before the runtime sees them: files, foreign operators, functions, too much memory."""

import dataclasses

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_client.bundle import Bundle
from edge_client.device import Workshop
from edge_client.errors import BundleError
from edge_client.inspection import declared_memory, inspect
from tests.toy import toy_bundle

BUNDLE = Bundle.from_bytes(toy_bundle())
KINDS = ["train", "eval", "infer"]


def altered(kind, change):
    """The toy with one graph changed."""
    model = onnx.load_from_string(getattr(BUNDLE, kind))
    change(model)
    return dataclasses.replace(BUNDLE, **{kind: model.SerializeToString()})


def external(tensor, location, **more):
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def tensor(name="secret"):
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])


def branch(*nodes, initializers=()):
    return helper.make_graph(list(nodes), "inner", [], [], list(initializers))


def nested(inner, depth=1):
    graph = inner
    for _ in range(depth):
        graph = branch(helper.make_node("If", ["c"], ["z"], then_branch=graph))
    return graph.node[0]


FILE = "names the file '/etc/passwd' for tensor 'secret'"
CUSTOM = "names operator 'Shell' of the domain 'com.evil'"
CHANGES = {
    "a file for a constant": (
        lambda model: model.graph.initializer.append(external(tensor(), "/etc/passwd")), FILE),
    "a file for a tensor of the bundle": (
        lambda model: model.graph.initializer.append(external(tensor("param.weight"), "/etc/passwd")),
        "names the file '/etc/passwd' for tensor 'param.weight'"),
    "a part of a file": (
        lambda model: model.graph.initializer.append(external(tensor(), "fedge", offset="0")), "names the file"),
    "a file without saying that there is one": (
        lambda model: (
            model.graph.initializer.append(external(tensor(), "/etc/passwd")),
            setattr(model.graph.initializer[-1], "data_location", TensorProto.DEFAULT)), FILE),
    "a constant that nobody hands over": (
        lambda model: model.graph.initializer.append(external(tensor(), "fedge")), "has no value for tensor 'secret'"),
    "a constant without a place": (
        lambda model: model.graph.initializer.append(
            TensorProto(name="secret", data_location=TensorProto.EXTERNAL)), "has no value for tensor 'secret'"),
    "a file in an attribute": (
        lambda model: model.graph.node.append(
            helper.make_node("Constant", [], ["k"], value=external(tensor(), "/etc/passwd"))), FILE),
    "a file in a branch": (
        lambda model: model.graph.node.append(
            nested(branch(initializers=[external(tensor(), "/etc/passwd")]))), FILE),
    "a tensor of the bundle in a branch": (
        lambda model: model.graph.node.append(
            nested(branch(initializers=[external(tensor("param.weight"), "fedge")]))), "has no value for tensor"),
    "a file in a sparse constant": (
        lambda model: model.graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=external(tensor(), "/etc/passwd"))), FILE),
    "a custom operator": (
        lambda model: model.graph.node.append(helper.make_node("Shell", [], ["k"], domain="com.evil")), CUSTOM),
    "a custom operator in a branch of a branch": (
        lambda model: model.graph.node.append(
            nested(branch(helper.make_node("Shell", [], ["k"], domain="com.evil")), 2)), CUSTOM),
    "a contributed operator": (
        lambda model: model.graph.node.append(helper.make_node("FusedGemm", [], ["k"], domain="com.microsoft")),
        "domain 'com.microsoft'"),
    "an operator set": (
        lambda model: model.opset_import.append(helper.make_opsetid("com.evil", 1)), "operators of the domain"),
    "functions": (
        lambda model: model.functions.append(onnx.FunctionProto(name="f", domain="")), "functions of its own"),
    "training information": (lambda model: model.training_info.add(), "functions of its own"),
    "graphs within graphs without end": (
        lambda model: model.graph.node.append(nested(branch(), 20)), "nests graphs more than 16 deep"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_device_does_not_run(kind, what):
    change, words = CHANGES[what]
    with pytest.raises(BundleError, match=f"{kind}.onnx .*{words}"):
        inspect(altered(kind, change))


@pytest.mark.parametrize(
    "options", [{}, {"hidden": 3, "momentum": True, "frozen": True, "buffer": True, "control": True}]
)
def test_bundles_as_they_are_exported_pass(options):
    inspect(Bundle.from_bytes(toy_bundle(**options)))


def test_a_standard_operator_of_any_kind_passes():
    def change(model):
        inner = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32)))
        model.graph.node.append(nested(branch(inner), 3))
        model.graph.node.append(helper.make_node("Relu", ["x"], ["r"], domain="ai.onnx"))

    inspect(altered("train", change))


def test_a_bundle_that_declares_too_much_memory_is_refused():
    layout = BUNDLE.layout.size
    assert declared_memory(BUNDLE) == 4 * layout * 2
    manifest = msgspec.structs.replace(BUNDLE.manifest, memory=300 << 20)
    heavy = dataclasses.replace(BUNDLE, manifest=manifest)
    inspect(heavy)
    inspect(heavy, memory_limit=301 << 20)
    with pytest.raises(BundleError, match="needs 300 MiB, the limit here is 256 MiB"):
        inspect(heavy, memory_limit=256 << 20)


def test_a_device_opens_nothing_that_it_should_not_run():
    workshop = Workshop(memory_limit=1)
    with pytest.raises(BundleError, match="declares"):
        workshop.open(bytes(32), toy_bundle())
    workshop.close()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_refused_or_passes_and_never_anything_else(data):
    graph = bytearray(BUNDLE.train)
    for _ in range(data.draw(st.integers(1, 5))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(graph)))
    for damaged in (bytes(graph), bytes(graph[:cut])):
        try:
            inspect(dataclasses.replace(BUNDLE, train=damaged))
        except BundleError as error:
            assert len(str(error)) < 500  # noqa: PT017
