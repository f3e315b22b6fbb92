"""A small graph of ONNX operators: what lowering emits, what passes rewrite, and what becomes an ONNX model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_client.errors import ExportError

HANDED_OVER = "fedge"
"""Where external data of a graph is said to be: nowhere, values of that name are handed over when it is loaded."""

OPSET = 20
"""The first opset with Gelu; every onnxruntime since 1.17 runs it."""

IR_VERSION = 9
BATCH = "batch"

Array = npt.NDArray[Any]
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint64": TensorProto.UINT64,
    "uint32": TensorProto.UINT32,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}


@dataclass(frozen=True)
class Port:
    """A graph input or output. ``None`` in ``shape`` is the batch dimension."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass
class Node:
    """One ONNX operator of the default domain."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    branches: "dict[str, Branch]" = field(default_factory=dict)

    def nested(self) -> "list[Node]":
        """The node and those of its branches, which may read any value before the node."""
        inner = (node for branch in self.branches.values() for node in branch.nodes)
        return [self, *(deeper for node in inner for deeper in node.nested())]

    def renamed(self, names: Mapping[str, str]) -> "Node":
        """The node with other names for values."""
        inputs, outputs = ([names.get(name, name) for name in given] for given in (self.inputs, self.outputs))
        branches = {key: branch.renamed(names) for key, branch in self.branches.items()}
        return Node(self.op, inputs, outputs, dict(self.attributes), branches)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two nodes that compute the same."""
        return (
            self.op,
            tuple(self.inputs),
            len(self.outputs),
            repr(sorted(self.attributes.items())),
            repr(self.branches),
        )


@dataclass
class Branch:
    """What an `If` does in one case, or a loop in one step, and what it gives; a loop also passes ``inputs`` in."""

    nodes: list[Node]
    outputs: list[Port]
    inputs: list[Port] = field(default_factory=list)

    def renamed(self, names: Mapping[str, str]) -> "Branch":
        """The branch with other names for values, its own included."""
        ports = [
            [Port(names.get(port.name, port.name), port.shape, port.dtype) for port in given]
            for given in (self.outputs, self.inputs)
        ]
        return Branch([node.renamed(names) for node in self.nodes], *ports)


@dataclass
class Graph:
    """Nodes in topological order, between named ports; ``shapes`` holds what is known of values in between."""

    inputs: list[Port]
    outputs: list[Port]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    external: list[Port] = field(default_factory=list)
    """Constants whose values are handed over when the graph is loaded."""

    def producers(self) -> dict[str, Node]:
        """Each value's producing node."""
        return {name: node for node in self.nodes for name in node.outputs}

    def uses(self) -> Counter[str]:
        """How often each value is read, graph outputs included."""
        counts = Counter(name for node in self.nodes for inner in node.nested() for name in inner.inputs)
        counts.update(port.name for port in self.outputs)
        return counts

    def drop_unused(self, names: Iterable[str]) -> None:
        """Remove those inputs of the given names that nothing reads."""
        uses, given = self.uses(), set(names)
        self.inputs = [port for port in self.inputs if port.name not in given or uses[port.name]]

    def hand_over(self, names: Iterable[str]) -> None:
        """Make constants without values of the inputs of the given names, where anything reads them."""
        given = set(names)
        self.drop_unused(given)
        self.external += [port for port in self.inputs if port.name in given]
        self.inputs = [port for port in self.inputs if port.name not in given]

    def embed(self, values: Mapping[str, Array]) -> None:
        """Make constants of the inputs of the given names."""
        self.constants |= {port.name: values[port.name] for port in self.inputs if port.name in values}
        self.inputs = [port for port in self.inputs if port.name not in values]
        self.prune()

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace values where nodes read them; follows chains of replacements."""

        def final(name: str) -> str:
            while name in names:
                name = names[name]
            return name

        for node in self.nodes:
            for inner in node.nested():
                inner.inputs = [final(name) for name in inner.inputs]

    def prune(self) -> None:
        """Drop nodes and constants that no output needs."""
        needed = {port.name for port in self.outputs}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(name for inner in node.nested() for name in inner.inputs if name)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    def to_model(self, name: str, least_ir: int = IR_VERSION) -> bytes:
        """Serialize as a checked ONNX model; external data is only that of `external`."""
        graph = helper.make_graph(
            [_proto(node, f"{node.op}_{i}") for i, node in enumerate(self.nodes)],
            name,
            [value_info(port) for port in (*self.inputs, *self.external)],
            [value_info(port) for port in self.outputs],
            [numpy_helper.from_array(value, key) for key, value in self.constants.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=least_ir, producer_name="fedge"
        )
        # The checker looks for files of external data, so it sees inputs instead.
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the {name} graph is not valid ONNX: {' '.join(str(error).split())[:200]}") from error
        del model.graph.input[len(self.inputs) :]
        model.graph.initializer.extend(_without_value(port) for port in self.external)
        data: bytes = model.SerializeToString()
        return data


def _without_value(port: Port) -> TensorProto:
    tensor = TensorProto(
        name=port.name,
        data_type=ELEMENT_TYPES[port.dtype],
        dims=[size or 0 for size in port.shape],
        data_location=TensorProto.EXTERNAL,
    )
    tensor.external_data.add(key="location", value=HANDED_OVER)
    return tensor


def _proto(node: Node, name: str) -> onnx.NodeProto:
    branches = {
        key: helper.make_graph(
            [_proto(inner, f"{name}_{key}_{i}") for i, inner in enumerate(branch.nodes)],
            key,
            [value_info(port) for port in branch.inputs],
            [value_info(port) for port in branch.outputs],
        )
        for key, branch in node.branches.items()
    }
    return helper.make_node(node.op, node.inputs, node.outputs, name=name, **node.attributes, **branches)


def value_info(port: Port) -> onnx.ValueInfoProto:
    """The ONNX declaration of a port."""
    shape = [BATCH if size is None else size for size in port.shape]
    return helper.make_tensor_value_info(port.name, ELEMENT_TYPES[port.dtype], shape)


@dataclass
class Builder:
    """Appends nodes to a graph and hands out names; equal constants are stored once."""

    graph: Graph
    prefix: str = "v"
    _count: int = 0
    _constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def name(self) -> str:
        """A name that no other value has."""
        self._count += 1
        return f"{self.prefix}{self._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs; returns their names."""
        names = [self.name() for _ in range(outputs)]
        self.graph.nodes.append(Node(kind, list(inputs), names, attributes))
        return names

    def output(self, name: str, port: Port) -> None:
        """Make a value an output of the graph, under the port's name."""
        self.graph.nodes.append(Node("Identity", [name], [port.name]))
        self.graph.outputs.append(port)

    def constant(self, value: Array) -> str:
        """The name of a constant tensor."""
        value = np.ascontiguousarray(value).reshape(value.shape)
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = name = self.name()
            self.graph.constants[name] = value
        return self._constants[key]

    def ints(self, values: Sequence[int] | Iterable[int]) -> str:
        """A 1-D int64 constant, as shapes and axes are given."""
        return self.constant(np.array(list(values), np.int64))

    def scalar(self, value: float, dtype: str) -> str:
        """A 0-D constant."""
        return self.constant(np.array(value, dtype))
