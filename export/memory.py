"""How much memory a graph needs while it runs: sizes of its values, and how long each lives in the runtime's order.

What counts is what the runtime allocates for values between the graph's inputs and outputs: not the model, the batch
and the results, whose memory is bound, nor what operators use for themselves. Views cost nothing. Elementwise operators
may write over what they read, which is not counted on, so that the plan is rather too high than too low.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from edge_client.errors import ExportError
from export.graph import BATCH, Graph, Node

VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"))
"""Operators whose result is their first input's memory."""

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{tail}": base**power
    for power, letter in enumerate("KMG", 1)
    for tail, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True)
class Plan:
    """When a graph needs most: at ``place`` in ``order``, for the values ``alive``; ``curve`` has all places' bytes."""

    place: int
    order: list[Node]
    alive: Mapping[str, int]
    curve: list[int]

    @property
    def peak(self) -> int:
        """Bytes at the worst place."""
        return max(self.curve, default=0)

    def excess(self, budget: int) -> int:
        """How far, and for how long, it is above a budget; zero where it fits."""
        return sum(max(0, size - budget) for size in self.curve)


def parse_size(text: str) -> int:
    """Bytes from ``64MiB``, ``64MB`` or ``65536``.

    Raises:
        ExportError: it is not a size above zero.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text.strip())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= size < 2**63:
        raise ExportError(f"{text!r} is not a size; give bytes, or a number with KiB, MiB, GiB, KB, MB or GB, as 64MiB")
    return int(size)


def format_size(size: int, *, up: bool = False) -> str:
    """Bytes as `parse_size` takes them, rounded, or rounded ``up``."""
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    tenths = math.ceil(size / unit * 10) if up else round(size / unit * 10)
    return f"{tenths / 10:.1f}{name}"


def measure(graph: Graph, batch: int) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Bytes of every value of ``graph`` at a batch of ``batch`` rows, and shapes, where ONNX can tell them."""
    model = onnx.load_from_string(graph.to_model("memory"))
    _set_batch(model.graph, batch)
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    sizes: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        known = graph.shapes.get(value.name)
        dims = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
        if known is not None and (0 in dims or not kind.HasField("shape")):
            dims = [size if size is not None else batch for size in known]
        elif 0 not in dims and kind.HasField("shape"):
            shapes[value.name] = tuple(dims)
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type or TensorProto.FLOAT)
        sizes[value.name] = math.prod(dims) * dtype.itemsize
    return sizes, shapes


def _set_batch(graph: onnx.GraphProto, batch: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.dim_value = batch
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _set_batch(attribute.g, batch)


def execution_order(nodes: Sequence[Node]) -> list[Node]:
    """The order in which ONNX Runtime runs ``nodes``: depth first from the last result, latest inputs first.

    As its default, `ExecutionOrder.DEFAULT`, does for a graph that it does not rewrite.
    """
    producers = {name: i for i, node in enumerate(nodes) for name in node.outputs}
    before = [
        sorted({producers[n] for inner in node.nested() for n in inner.inputs if n in producers} - {i})
        for i, node in enumerate(nodes)
    ]
    read = {source for sources in before for source in sources}
    stack = [(i, False) for i in range(len(nodes)) if i not in read]
    visited = [False] * len(nodes)
    order: list[Node] = []
    while stack:
        i, leaving = stack.pop()
        if leaving:
            order.append(nodes[i])
        elif not visited[i]:
            visited[i] = True
            stack.append((i, True))
            stack.extend((source, False) for source in before[i] if not visited[source])
    return order


def roots(nodes: Iterable[Node]) -> dict[str, str]:
    """Of every view, the value whose memory it shows."""
    found: dict[str, str] = {}
    for node in nodes:
        if node.op in VIEWS:
            found[node.outputs[0]] = found.get(node.inputs[0], node.inputs[0])
    return found


def plan(nodes: Sequence[Node], sizes: Mapping[str, int], bound: Iterable[str], held: Iterable[str] = ()) -> Plan:
    """The peak of what is alive at once, where ``bound`` results have memory of their own and ``held`` ones stay."""
    order = execution_order(nodes)
    shown = roots(order)
    outside, stay = set(bound), {shown.get(name, name) for name in held}
    last: dict[str, int] = {}
    for place, node in enumerate(order):
        for inner in node.nested():
            last.update((shown.get(name, name), place) for name in inner.inputs)
    ending: dict[int, list[str]] = {}
    alive: dict[str, int] = {}
    total, worst = 0, 0
    snapshot: dict[str, int] = {}
    curve: list[int] = []
    for place, node in enumerate(order):
        for name in node.outputs:
            if name and name not in shown and name not in outside:
                alive[name] = sizes.get(name, 0)
                total += alive[name]
                if name not in stay:
                    ending.setdefault(last.get(name, place), []).append(name)
        if not curve or total > curve[worst]:
            worst, snapshot = place, dict(alive)
        curve.append(total)
        for name in ending.pop(place, ()):
            total -= alive.pop(name)
    return Plan(worst, order, snapshot, curve)


def early_results_first(graph: Graph) -> None:
    """Order the nodes such that the runtime makes those results first that take least.

    It begins with the last of the nodes that no other reads. Were that the update of the first layer, it would wait for
    the whole backward pass, and all that the other layers' gradients are made of with it.
    """
    place = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    before = [
        {place[n] for inner in node.nested() for n in inner.inputs if n in place} - {i}
        for i, node in enumerate(graph.nodes)
    ]
    needed: list[int] = []
    for sources in before:
        # Bits say which nodes a node is computed from.
        bits = 0
        for source in sources:
            bits |= needed[source] | 1 << source
        needed.append(bits)
    read = {source for sources in before for source in sources}
    last = [i for i in range(len(before)) if i not in read]
    last.sort(key=lambda i: needed[i].bit_count(), reverse=True)
    graph.nodes = [node for i, node in enumerate(graph.nodes) if i in read] + [graph.nodes[i] for i in last]
