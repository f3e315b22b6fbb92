"""A training step that may write each result over the value that it replaces.

A device binds ``next.<t>`` to the memory of ``param.<t>``, and an optimizer's slots likewise: one copy of the model
instead of two. The runtime runs a node when its inputs are there, in an order of its own, and promises nothing else. So
`make_in_place` turns what must not be overtaken into inputs: the node that writes a result depends on every other node
that reads the old value. The dependency costs no pass over memory. One operand of the writer goes through a Reshape,
which shares memory, to the shape ``[0, ...]``, which keeps every dimension; those zeros are a product with the sizes of
what the readers made, and Size looks at no values. (Nothing folds it: a size is no constant, even where it is known.)

A node may overwrite what it reads itself only where it works element by element, or adds a matrix product to it; and it
cannot wait for a reader that waits for it. In other cases the result is copied once all readers are done.

`check_in_place` runs the graph as a device does: optimizers of the runtime may join nodes.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client import runtime
from edge_client.errors import ExportError
from export.graph import Graph, Node, Port
from export.memory import VIEWS
from export.step import SEED, Problem
from export.updates import STEP
from export.verify import Graphs

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Identity"}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_STEPS, _ROWS = 3, 5

Arrays = dict[str, npt.NDArray[np.generic]]


def replaced(outputs: list[str], inputs: list[str]) -> dict[str, str]:
    """For each result that replaces a value: the result's name, and the value's (``param.*`` or ``slot.*``)."""
    values = {"next." + name.split(".", 1)[1]: name for name in inputs if name.startswith(("param.", "slot."))}
    return {name: values[name] for name in outputs if name in values}


def make_in_place(graph: Graph) -> None:
    """Rewrite ``graph`` so that every result may have the memory of the value that it replaces, in whatever order."""
    ports = {port.name: port for port in graph.outputs}
    for new, old in replaced(list(ports), [port.name for port in graph.inputs]).items():
        _order(graph, ports[new], old)
        _sort(graph)


def _order(graph: Graph, port: Port, old: str) -> None:
    """Let the node that writes ``port`` run after all others that read ``old``."""
    producers = graph.producers()
    writer = producers[port.name]
    if writer.op == "Identity" and writer.inputs == [old]:
        return
    views, readers = _readers(graph, old)
    waits = [node for node in readers if node is not writer and not _computed_from(producers, writer, node)]
    mutual = any(_computed_from(producers, node, writer) for node in waits)
    place = _operand(graph, producers, writer, port)
    if mutual or not _may_overwrite(producers, writer, views, readers) or (waits and place is None):
        unordered = f"{port.name}.copied"
        for node in graph.nodes:
            for inner in node.nested():
                inner.inputs = [unordered if name == port.name else name for name in inner.inputs]
        writer.outputs = [unordered if name == port.name else name for name in writer.outputs]
        if writer.op in VIEWS:
            # Another name of memory that may be written to: here Tile, which repeats it once, is a copy that stays one.
            ones, writer.outputs = f"{unordered}.ones", [f"{unordered}.view"]
            graph.constants[ones] = np.ones(len(port.shape), np.int64)
            writer = Node("Tile", [*writer.outputs, ones], [unordered])
            graph.nodes.append(writer)
        graph.nodes += _held(graph, port, unordered, port.name, len(port.shape), [writer, *waits])
    elif waits and place is not None:
        operand, held = writer.inputs[place], f"{port.name}.held"
        graph.nodes += _held(graph, port, operand, held, len(graph.shapes[operand]), waits)
        writer.inputs[place] = held


def _readers(graph: Graph, old: str) -> tuple[set[str], list[Node]]:
    """All names of the memory of ``old``, and the nodes that read it, other than to give it another name."""
    outputs = {port.name for port in graph.outputs}
    views, readers = {old}, []
    for node in graph.nodes:
        if not views.isdisjoint(name for inner in node.nested() for name in inner.inputs):
            if node.op in VIEWS and outputs.isdisjoint(node.outputs):
                views.update(node.outputs)
            else:
                readers.append(node)
    return views, readers


def _computed_from(producers: Mapping[str, Node], node: Node, source: Node) -> bool:
    """Whether ``node`` needs what ``source`` makes, directly or not."""
    wanted, seen, left = set(source.outputs), set[str](), [node]
    while left:
        for inner in left.pop().nested():
            for name in inner.inputs:
                if name in wanted:
                    return True
                if name in producers and name not in seen:
                    seen.add(name)
                    left.append(producers[name])
    return False


def _may_overwrite(producers: Mapping[str, Node], writer: Node, views: set[str], readers: list[Node]) -> bool:
    """Whether the result may have the memory of ``views``, as far as the writer's own reading goes."""
    if writer.op == "If" and len(writer.outputs) == 1:
        return all(
            node.op != "If" and _may_overwrite(producers, node, views, readers)
            for branch in writer.branches.values()
            for node in branch.nodes
            if node.outputs[0] == branch.outputs[0].name
        )
    # Sums of products become one product, which reads all of its operands while it writes.
    for name in writer.inputs:
        if name in producers and producers[name].op in _PRODUCTS and any(producers[name] is r for r in readers):
            return False
    overwritten = writer.inputs[2:] if writer.op == "Gemm" else writer.inputs if writer.op in _ELEMENTWISE else []
    kept = writer.inputs[: len(writer.inputs) - len(overwritten)]
    nested = [name for node in writer.nested()[1:] for name in node.inputs]
    return views.isdisjoint([*kept, *nested])


def _operand(graph: Graph, producers: Mapping[str, Node], writer: Node, port: Port) -> int | None:
    """Which input of the writer is to wait; None if none of them has a known number of dimensions."""
    if writer.op == "If":
        return 0
    known = [place for place, name in enumerate(writer.inputs) if name in graph.shapes]

    def cost(place: int) -> tuple[bool, bool]:
        name = writer.inputs[place]
        # A Reshape behind a product would keep the runtime from adding in the product.
        product = name in producers and producers[name].op in _PRODUCTS
        return product, graph.shapes[name] != port.shape

    return min(known, key=cost, default=None)


def _held(graph: Graph, port: Port, value: str, result: str, rank: int, waits: list[Node]) -> Iterator[Node]:
    """``result``: ``value`` once all of ``waits`` have run."""
    shape = f"{port.name}.shape"
    graph.constants[shape] = np.zeros(rank, np.int64)
    for number, node in enumerate(waits):
        size, after = f"{port.name}.size{number}", f"{port.name}.shape{number}"
        yield Node("Size", [next(name for name in node.outputs if name)], [size])
        yield Node("Mul", [shape, size], [after])
        shape = after
    yield Node("Reshape", [value, shape], [result])


def _sort(graph: Graph) -> None:
    """Order the nodes such that each comes after those that it reads, and otherwise as they are."""
    place = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs}
    before = [
        {place[name] for inner in node.nested() for name in inner.inputs if name in place and place[name] != i}
        for i, node in enumerate(graph.nodes)
    ]
    after: list[list[int]] = [[] for _ in graph.nodes]
    for i, needed in enumerate(before):
        for j in needed:
            after[j].append(i)
    missing = [len(needed) for needed in before]
    ready = [i for i, count in enumerate(missing) if not count]
    nodes = []
    while ready:
        i = heapq.heappop(ready)
        nodes.append(graph.nodes[i])
        for j in after[i]:
            missing[j] -= 1
            if not missing[j]:
                heapq.heappush(ready, j)
    assert len(nodes) == len(graph.nodes), "an in-place update waits for itself"
    graph.nodes = nodes


def check_in_place(problem: Problem, graphs: Graphs) -> None:
    """Run steps in place, in the runtime's default order and in that by priority, beside steps with separate memory.

    Once without weight decay and once with, as updates of large weights take another branch then.

    Raises:
        ExportError: a result differs in any bit.
    """
    rng = np.random.default_rng(0)
    constants = graphs.values("train", problem.state)
    given: Arrays = {f"param.{name}": tensor.numpy() for name, tensor in problem.state.items()}
    given |= {f"hyper.{hyper.name}": np.array(hyper.default, np.float32) for hyper in problem.hypers}
    given |= {STEP: np.array(0), SEED: np.array(1)}
    for feature in (*problem.inputs, *problem.targets):
        shape = (_ROWS, *feature.shape)
        floats = feature.dtype == "float32"
        given[feature.name] = rng.standard_normal(shape, np.float32) if floats else np.zeros(shape, np.int64)
    for by_priority in (False, True):
        session = runtime.session(graphs.train, constants=constants, by_priority=by_priority)
        for value in session.get_inputs():
            if value.name not in given:
                # Optimizer state, anchors, control variates.
                given[value.name] = rng.uniform(0, 0.1, value.shape).astype(np.float32)
        for decay in (0.0, 0.01):
            given["hyper.weight_decay"] = np.array(decay, np.float32)
            if changed := _in_place_differs(session, given):
                raise ExportError(
                    f"the training graph cannot update {changed!r} in place on onnxruntime {runtime.VERSION}; "
                    "nothing was written. Report the model"
                )


def _in_place_differs(session: Any, given: Arrays) -> str:
    """Of the values that a step replaces, one that becomes another when its memory is used again; else nothing."""
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    pairs = replaced(outputs, inputs)
    separate, shared = ({name: given[name].copy() for name in inputs} for _ in range(2))
    binding = session.io_binding()
    values = {name: runtime.shared(array) for name, array in shared.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        if name in pairs:
            binding.bind_ortvalue_output(name, values[pairs[name]])
        else:
            binding.bind_output(name)
    for step in range(1, _STEPS + 1):
        for arrays in (separate, shared):
            if STEP in arrays:
                arrays[STEP][...] = step
        found = dict(zip(outputs, session.run(outputs, separate), strict=True))
        separate |= {old: found[new] for new, old in pairs.items()}
        runtime.run(session, binding)
    return next((old for old in pairs.values() if separate[old].tobytes() != shared[old].tobytes()), "")
