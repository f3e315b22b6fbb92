"""Gradient accumulation inside the graph: a batch passes forward and backward in slices, one after the other.

One run is still one optimizer step on the whole batch. A Loop adds up losses, metrics and gradients of the slices as
sums, and the update divides by what the mean loss of the whole batch divides by, so that weighted and ignored targets
come out right, and a smaller last slice too. Activations are those of one slice; in return the sums of the gradients
are held twice, as they were and as they will be.
"""

from collections.abc import Sequence
from dataclasses import replace

from export.graph import Branch, Builder, Graph, Node, Port
from export.step import SLICE, TOTAL

_INSIDE, _UPDATE = "slice.", "update."


def accumulate(part: Graph, update: Graph, batched: Sequence[str], rows: int) -> Graph:
    """One step from ``part``, the passes of a slice (`step.slice_step`), and ``update`` (`step.update_step`).

    ``batched`` names the inputs that are cut into slices of ``rows`` rows.
    """
    ports = {port.name: port for port in part.inputs}
    after = {port.name: port.name.removeprefix("next.") for port in part.outputs}
    before = {name: rest if rest.startswith(TOTAL) else f"param.{rest}" for name, rest in after.items()}
    inside = [*batched, SLICE, *before, *before.values()]
    body = _renamed(part, _INSIDE, inside)
    update = _renamed(update, _UPDATE, [])
    ours = {*before.values(), SLICE}
    graph = Graph(
        _union(
            [port for name, port in ports.items() if name not in ours or name.startswith("param.")],
            [port for port in update.inputs if not port.name.startswith(TOTAL)],
        ),
        [*update.outputs, *(port for port in part.outputs if not before[port.name].startswith(TOTAL))],
        constants=body.constants | update.constants,
        shapes=body.shapes | update.shapes,
        external=_union(part.external, update.external),
    )
    b = Builder(graph, prefix="loop.")
    size = b.op("Shape", batched[0], start=0, end=1)
    width = b.ints([rows])
    count = b.op("Div", b.op("Add", size, b.ints([rows - 1])), width)
    starts = [_first(b, ports[source]) if source.startswith(TOTAL) else source for source in before.values()]
    trips = b.op("Squeeze", count)
    outer, graph.nodes = graph.nodes, []
    start = b.op("Mul", b.op("Reshape", _INSIDE + SLICE, b.ints([1])), width)
    end = b.op("Add", start, width)
    read = body.uses()
    cuts = [Node("Slice", [n, start, end, b.ints([0])], [_INSIDE + n]) for n in batched if read[_INSIDE + n]]
    more = f"{_INSIDE}more"
    branch = Branch(
        [*graph.nodes, *cuts, *body.nodes, Node("Identity", [more], [f"{more}.after"])],
        [Port(f"{more}.after", (), "bool"), *body.outputs],
        [
            Port(_INSIDE + SLICE, (), "int64"),
            Port(more, (), "bool"),
            *(replace(ports[source], name=_INSIDE + source) for source in before.values()),
        ],
    )
    results = [rest if rest.startswith(TOTAL) else name for name, rest in after.items()]
    graph.nodes = [*outer, Node("Loop", [trips, "", *starts], results, {}, {"body": branch}), *update.nodes]
    return graph


def _first(b: Builder, port: Port) -> str:
    """Zeros of a port's shape, made when the loop begins."""
    shape = [int(size or 0) for size in port.shape]
    return b.op("ConstantOfShape", b.ints(shape)) if shape else b.scalar(0, port.dtype)


def _renamed(graph: Graph, prefix: str, ports: Sequence[str]) -> Graph:
    """The graph with a prefix before all that it makes, so that it can lie in one graph with another, and ``ports``."""
    every = [inner for node in graph.nodes for inner in node.nested()]
    own = {name for node in every for name in node.outputs} | set(graph.constants)
    own |= {port.name for node in every for branch in node.branches.values() for port in branch.inputs}
    own |= {port.name for node in every for branch in node.branches.values() for port in branch.outputs}
    names = {name: prefix + name for name in {*(own - {port.name for port in graph.outputs}), *ports} if name}
    return Graph(
        graph.inputs,
        [replace(port, name=names.get(port.name, port.name)) for port in graph.outputs],
        [node.renamed(names) for node in graph.nodes],
        {names.get(name, name): value for name, value in graph.constants.items()},
        {names.get(name, name): shape for name, shape in graph.shapes.items()},
    )


def _union(first: Sequence[Port], second: Sequence[Port]) -> list[Port]:
    return list({port.name: port for port in (*first, *second)}.values())
