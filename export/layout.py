"""Move transposes out of the way: formulations of convolution have layouts of their own, and what lies between two of
them (activation, bias, normalization, addition, sums) works in any. A transpose moves behind such operators until it
meets its inverse, or what needs the order that it makes.
"""

from collections.abc import Sequence

import numpy as np
import onnx

from export.graph import BATCH, Builder, Graph, Node

Shape = tuple[int | str, ...]

_ELEMENTWISE = frozenset(
    ["Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "Not", "Or", "Pow", "PRelu", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where", "Xor"]
)
_REDUCTIONS = frozenset(["ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"])


def push_transposes(graph: Graph) -> bool:
    """Rewrite ``graph`` in place; returns whether anything moved."""
    if not any(node.op == "Transpose" for node in graph.nodes):
        return False
    return _Pusher(graph).run()


def infer_shapes(graph: Graph) -> dict[str, Shape]:
    """Sizes of every value that ONNX can tell; sizes that depend on the batch are names."""
    model = onnx.load_from_string(graph.to_model("shapes"))
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    found: dict[str, Shape] = {name: value.shape for name, value in graph.constants.items()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            # A size without a name equals no other.
            found[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}[{i}]"
                for i, d in enumerate(dims)
            )
    for name, shape in graph.shapes.items():
        found.setdefault(name, tuple(BATCH if size is None else size for size in shape))
    return found


class _Pusher:
    """One pass over the nodes in order. ``_inner[name] = (source, perm)`` says that ``name`` is a transpose of it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shapes = infer_shapes(graph)
        self._inner: dict[str, tuple[str, list[int]]] = {}
        self._made = Builder(Graph([], [], constants=graph.constants), prefix=_fresh_prefix(graph))
        self._moved = False

    def run(self) -> bool:
        """Walk over the nodes; returns whether anything moved."""
        for node in self._graph.nodes:
            if node.op == "Transpose":
                self._keep(node)
                source, perm = node.inputs[0], node.attributes["perm"]
                if source in self._inner:
                    base, first = self._inner[source]
                    source, perm = base, [first[i] for i in perm]
                self._inner[node.outputs[0]] = (source, list(perm))
            elif not self._push(node):
                self._keep(node)
        self._graph.nodes = self._made.graph.nodes
        self._graph.prune()
        return self._moved

    def _keep(self, node: Node) -> None:
        self._made.graph.nodes.append(node)

    def _push(self, node: Node) -> bool:
        if node.branches or not node.inputs:
            return False
        if node.op in _ELEMENTWISE:
            return self._push_elementwise(node)
        found = self._inner.get(node.inputs[0])
        if node.op in _REDUCTIONS and found is not None:
            return self._push_reduction(node, *found)
        if node.op in ("Slice", "Pad", "Split", "Concat"):
            return self._push_along_axes(node)
        return False

    def _push_elementwise(self, node: Node) -> bool:
        shape = self._shapes.get(node.outputs[0])
        # Min, max and the like of Clip are scalars, and so are missing inputs.
        given = [name for name in node.inputs if name and self._shapes.get(name) != ()]
        perms = {tuple(self._inner[n][1]) for n in given if n in self._inner and self._shapes.get(n) == shape}
        if shape is None or len(perms) != 1:
            return False
        perm = list(perms.pop())
        if perm == sorted(perm):
            return False
        renamed: dict[str, str] = {}
        for name in given:
            found = self._inner.get(name)
            other = self._shapes.get(name)
            if found is not None and found[1] == perm:
                renamed[name] = found[0]
            elif other is None or other == shape:
                return False
            else:
                renamed[name] = self._broadcast(name, other, perm)
        inner = Node(node.op, [renamed.get(n, n) for n in node.inputs], [self._made.name()], dict(node.attributes))
        self._finish(node, inner, perm, [shape[i] for i in np.argsort(perm)])
        return True

    def _broadcast(self, name: str, shape: Shape, perm: Sequence[int]) -> str:
        """A value that is broadcast, with its axes as they are before the transpose."""
        rank = len(perm)
        inverse = [int(i) for i in np.argsort(perm)]
        widened = (1,) * (rank - len(shape)) + shape
        if name in self._graph.constants:
            return self._made.constant(self._graph.constants[name].reshape(widened).transpose(inverse))
        if sum(size != 1 for size in widened) <= 1 and all(isinstance(size, int) for size in widened):
            return self._made.op("Reshape", name, self._made.ints([int(widened[i]) for i in inverse]))
        if len(shape) < rank:
            name = self._made.op("Unsqueeze", name, self._made.ints(range(rank - len(shape))))
        return self._made.op("Transpose", name, perm=inverse)

    def _push_reduction(self, node: Node, source: str, perm: list[int]) -> bool:
        constant = self._graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        shape = self._shapes.get(node.outputs[0])
        if constant is None or constant.size == 0 or shape is None:
            return False
        rank = len(perm)
        axes = [int(a) % rank for a in constant]
        inner = Node(
            node.op, [source, self._made.ints(sorted(perm[a] for a in axes))], [self._made.name()], dict(node.attributes)
        )
        if node.attributes.get("keepdims", 1):
            self._finish(node, inner, perm, [shape[i] for i in np.argsort(perm)])
            return True
        kept = [perm[a] for a in range(rank) if a not in axes]
        order = [sorted(kept).index(k) for k in kept]
        self._finish(node, inner, order, [shape[i] for i in np.argsort(order)])
        return True

    def _push_along_axes(self, node: Node) -> bool:
        """Operators whose axes are named: an attribute, or constants."""
        whole = node.inputs if node.op == "Concat" else node.inputs[:1]
        found = [self._inner.get(name) for name in whole]
        perm = found[0][1] if found[0] is not None else []
        if not perm or perm == sorted(perm) or any(f is None or f[1] != perm for f in found):
            return False
        shapes = [self._shapes.get(name) for name in node.outputs]
        sources = [f[0] for f in found if f is not None]
        attributes, rest = dict(node.attributes), list(node.inputs[len(whole) :])
        if node.op in ("Split", "Concat"):
            attributes["axis"] = perm[node.attributes.get("axis", 0) % len(perm)]
        elif node.op == "Slice":
            axes = self._graph.constants.get(rest[2]) if len(rest) > 2 else None
            if axes is None:
                return False
            rest[2] = self._made.ints(perm[int(a) % len(perm)] for a in axes)
        else:
            pads = self._graph.constants.get(rest[0])
            if pads is None or len(rest) > 2:
                return False
            turned = pads.reshape(2, -1)[:, np.argsort(perm)]
            rest[0] = self._made.ints(turned.ravel())
        if any(shape is None for shape in shapes):
            return False
        names = [self._made.name() for _ in node.outputs]
        self._keep(Node(node.op, [*sources, *rest], names, attributes))
        for name, output, shape in zip(names, node.outputs, shapes, strict=True):
            assert shape is not None
            self._transposed(name, output, perm, [shape[i] for i in np.argsort(perm)])
        return True

    def _finish(self, node: Node, inner: Node, perm: Sequence[int], shape: Sequence[int | str]) -> None:
        self._keep(inner)
        self._transposed(inner.outputs[0], node.outputs[0], perm, shape)

    def _transposed(self, name: str, output: str, perm: Sequence[int], shape: Sequence[int | str]) -> None:
        self._shapes[name] = tuple(shape)
        self._graph.shapes[name] = tuple(size if isinstance(size, int) else None for size in shape)
        self._keep(Node("Transpose", [name], [output], {"perm": [int(i) for i in perm]}))
        self._inner[output] = (name, [int(i) for i in perm])
        self._moved = True


def _fresh_prefix(graph: Graph) -> str:
    """A prefix of names that no value has yet."""
    taken = {name for node in graph.nodes for name in node.outputs} | set(graph.constants)
    number = 0
    while any(name.startswith(f"l{number}_") for name in taken):
        number += 1
    return f"l{number}_"
