"""Graph passes: fewer passes over memory, fewer nodes."""

from export.graph import Graph, Node
from export.layout import infer_shapes, postpone_expands, push_transposes


def optimize(graph: Graph) -> Graph:
    """Rewrite ``graph`` in place until nothing improves; the results stay the same up to rounding. Returns it."""
    graph.prune()
    while (
        merge_equal(graph) | fold_transposes(graph) | fuse_updates(graph) | bypass(graph)
        or postpone_expands(graph)
        or broadcast_products(graph)
        or push_transposes(graph)
    ):
        graph.prune()
    name_outputs(graph)
    graph.prune()
    return graph


def merge_equal(graph: Graph) -> bool:
    """Common subexpressions: two nodes that compute the same become one."""
    seen: dict[tuple[object, ...], Node] = {}
    names: dict[str, str] = {}
    outputs = {port.name for port in graph.outputs}
    kept = []
    for node in graph.nodes:
        for inner in node.nested():
            inner.inputs = [names.get(name, name) for name in inner.inputs]
        first = seen.setdefault(node.key, node)
        if first is node or outputs.intersection(node.outputs):
            kept.append(node)
        else:
            names.update(zip(node.outputs, first.outputs, strict=True))
    graph.nodes = kept
    return bool(names)


def fold_transposes(graph: Graph) -> bool:
    """A matrix transpose before a Gemm becomes the Gemm's flag; two transposes become one."""
    producers, uses = graph.producers(), graph.uses()
    changed = False
    for node in graph.nodes:
        if node.op == "Gemm":
            for i, flag in enumerate(("transA", "transB")):
                source = producers.get(node.inputs[i])
                if source is not None and source.op == "Transpose" and source.attributes["perm"] == [1, 0]:
                    node.inputs[i] = source.inputs[0]
                    node.attributes[flag] = 1 - node.attributes.get(flag, 0)
                    changed = True
        elif node.op == "Transpose":
            source = producers.get(node.inputs[0])
            if source is not None and source.op == "Transpose":
                inner, outer = source.attributes["perm"], node.attributes["perm"]
                node.attributes["perm"] = [inner[i] for i in outer]
                node.inputs = list(source.inputs)
                changed = True
            elif source is not None and source.op == "Gemm" and uses[node.inputs[0]] == 1 and _bare(source):
                # (A B)^T = B^T A^T: the product comes out as its reader wants it.
                a, b = source.inputs[:2]
                flags = (1 - source.attributes.get("transB", 0), 1 - source.attributes.get("transA", 0))
                alpha = source.attributes.get("alpha", 1.0)
                node.op, node.inputs = "Gemm", [b, a]
                node.attributes = {"transA": flags[0], "transB": flags[1], "alpha": alpha}
                changed = True
    return changed


def fuse_updates(graph: Graph) -> bool:
    """``W - A B`` and ``W + A B`` become one Gemm, which saves a pass over the weights."""
    producers, uses = graph.producers(), graph.uses()
    changed = False
    for node in graph.nodes:
        if node.op not in ("Sub", "Add"):
            continue
        candidates = [1] if node.op == "Sub" else [1, 0]
        for i in candidates:
            product = producers.get(node.inputs[i])
            other = node.inputs[1 - i]
            if product is None or product.op != "Gemm" or not _bare(product) or uses[node.inputs[i]] != 1:
                continue
            if graph.shapes.get(other) != graph.shapes.get(node.inputs[i]) or other not in graph.shapes:
                continue
            sign = -1.0 if node.op == "Sub" else 1.0
            attributes = {**product.attributes, "alpha": sign * product.attributes.get("alpha", 1.0), "beta": 1.0}
            node.op, node.inputs, node.attributes = "Gemm", [*product.inputs[:2], other], attributes
            changed = True
            break
    return changed


def broadcast_products(graph: Graph) -> bool:
    """A matrix repeated for each example of a `MatMul` is read where it is: one product of all rows, not many."""
    producers = graph.producers()
    repeated = [
        (node, i, producers[node.inputs[i]].inputs[0])
        for node in graph.nodes
        if node.op == "MatMul"
        for i in (0, 1)
        if node.inputs[i] in producers and producers[node.inputs[i]].op == "Expand"
    ]
    shapes = infer_shapes(graph) if repeated else {}
    changed = False
    for node, i, source in repeated:
        shape, other, small = (shapes.get(name, ()) for name in (node.inputs[i], node.inputs[1 - i], source))
        # The other matrix gives the result its dimensions then, which it must have itself.
        if len(shape) > 1 and shape[-2:] == small[-2:] and shape[:-2] == other[:-2]:
            node.inputs[i] = source
            changed = True
    return changed


def bypass(graph: Graph) -> bool:
    """Nodes that change nothing are skipped: Identity, a transpose or a reshape to what is there already."""
    names: dict[str, str] = {}
    outputs = {port.name for port in graph.outputs}
    producers = graph.producers()
    chained = False
    for node in graph.nodes:
        if node.op == "Reshape" and not node.attributes and node.inputs[1] in graph.constants:
            source = producers.get(node.inputs[0])
            if source is not None and source.op == "Reshape" and 0 not in graph.constants[node.inputs[1]]:
                node.inputs[0] = source.inputs[0]
                chained = True
        if outputs.intersection(node.outputs):
            continue
        perm = node.attributes.get("perm")
        shape = graph.shapes.get(node.outputs[0])
        same = shape is not None and shape == graph.shapes.get(node.inputs[0]) if node.inputs else False
        if (
            node.op == "Identity"
            or (node.op == "Transpose" and perm == sorted(perm or ()))
            or (node.op == "Reshape" and same and (shape or ()).count(None) <= 1)
            or (node.op == "Expand" and same and (shape or ()).count(None) == 0)
        ):
            names[node.outputs[0]] = node.inputs[0]
    graph.nodes = [node for node in graph.nodes if node.outputs[0] not in names]
    graph.rename(names)
    return bool(names) or chained


def name_outputs(graph: Graph) -> None:
    """Where an Identity only gives a value its output name, the producer takes that name."""
    producers = graph.producers()
    ports = {port.name for port in graph.outputs} | {port.name for port in graph.inputs} | set(graph.constants)
    names: dict[str, str] = {}
    dropped = []
    for node in graph.nodes:
        target = node.outputs[0]
        source = node.inputs[0] if node.inputs else ""
        if node.op == "Identity" and source in producers and source not in ports and source not in names:
            names[source] = target
            dropped.append(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in dropped]
    for node in graph.nodes:
        node.outputs = [names.get(name, name) for name in node.outputs]
    graph.rename(names)


def _bare(gemm: Node) -> bool:
    return len(gemm.inputs) == 2
