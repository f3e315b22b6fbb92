"""Move transposes out of the way: formulations of convolution have layouts of their own, and what lies between two of
them (activation, bias, normalization, addition, sums) works in any. A transpose moves behind such operators until it
meets its inverse, or what needs the order that it makes.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx

from export.graph import BATCH, Builder, Graph, Node

Shape = tuple[int | str, ...]

_ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "Ceil",
        "Clip",
        "Cos",
        "Div",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsNaN",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Mean",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "PRelu",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "ThresholdedRelu",
        "Where",
        "Xor",
    ]
)
_REDUCTIONS = frozenset(f"Reduce{kind}" for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"))


def push_transposes(graph: Graph) -> bool:
    """Rewrite ``graph`` in place; returns whether anything moved."""
    if not any(node.op == "Transpose" for node in graph.nodes):
        return False
    return _Pusher(graph).run()


def infer_shapes(graph: Graph) -> dict[str, Shape]:
    """Sizes of every value that ONNX can tell; sizes that depend on the batch are names."""
    return _inferred(graph)[0]


def _inferred(graph: Graph) -> tuple[dict[str, Shape], set[str]]:
    """Sizes, and the names of float32 values."""
    model = onnx.load_from_string(graph.to_model("shapes"))
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    found: dict[str, Shape] = {name: value.shape for name, value in graph.constants.items()}
    floats = {name for name, value in graph.constants.items() if value.dtype == np.float32}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            floats.add(value.name)
        if value.type.tensor_type.HasField("shape"):
            # Symbolic sizes meet in one operator only where they are equal, whatever names ONNX gives them.
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else BATCH for d in dims)
    # What was traced is known better: ONNX loses the batch in a reshape.
    found |= {name: tuple(BATCH if n is None else n for n in shape) for name, shape in graph.shapes.items()}
    for node in reversed(graph.nodes):
        if node.op == "Transpose" and node.outputs[0] in found:
            shape = found[node.outputs[0]]
            found[node.inputs[0]] = tuple(shape[i] for i in np.argsort(node.attributes["perm"]))
    return found, floats


def postpone_expands(graph: Graph) -> bool:
    """What is the same for many elements is computed once, and never written out where an operator broadcasts it."""
    producers, shapes = graph.producers(), infer_shapes(graph)
    uses = graph.uses()
    changed = False
    for node in graph.nodes:
        wide = [i for i, name in enumerate(node.inputs) if name in producers and producers[name].op == "Expand"]
        if node.op not in _ELEMENTWISE or not wide:
            continue
        expand = producers[node.inputs[wide[0]]]
        shape, others = shapes.get(node.inputs[wide[0]]), [n for i, n in enumerate(node.inputs) if i != wide[0]]
        if shape is None or shapes.get(node.outputs[0]) != shape:
            continue
        if any(shapes.get(name) == shape and name not in (node.inputs[i] for i in wide) for name in others):
            node.inputs[wide[0]] = expand.inputs[0]
            changed = True
        elif all(shapes.get(name) == () for name in others if name) and uses[node.inputs[wide[0]]] == 1:
            # The two nodes change places, and names: what read the one reads the other.
            small, result = expand.outputs[0], node.outputs[0]
            node.inputs[wide[0]] = expand.inputs[0]
            node.outputs, expand.inputs[0], expand.outputs = [small], small, [result]
            # Behind it, not in each other's place: what else the node reads may come after the Expand.
            graph.nodes.remove(expand)
            graph.nodes.insert(graph.nodes.index(node) + 1, expand)
            graph.shapes.pop(small, None)
            return True
    return changed


class _Pusher:
    """One pass over the nodes in order. ``_inner[name] = (source, perm)`` says that ``name`` is a transpose of it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shapes, self._floats = _inferred(graph)
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
        if node.op == "BatchNormalization" and found is not None:
            return self._push_normalization(node, *found)
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
        inner_name = next(self._inner[n][0] for n in given if n in self._inner and self._shapes.get(n) == shape)
        for name in given:
            found = self._inner.get(name)
            other = self._shapes.get(name)
            if found is not None and found[1] == perm:
                renamed[name] = found[0]
            elif other is None or other == shape:
                return False
            else:
                renamed[name] = self._broadcast(name, other, perm, inner_name)
        inner = Node(node.op, [renamed.get(n, n) for n in node.inputs], [self._made.name()], dict(node.attributes))
        self._finish(node, inner, perm, [shape[i] for i in np.argsort(perm)])
        return True

    def _broadcast(self, name: str, shape: Shape, perm: Sequence[int], inner: str) -> str:
        """A value that is broadcast over ``inner``, with its axes as they are before the transpose."""
        rank = len(perm)
        inverse = [int(i) for i in np.argsort(perm)]
        widened = (1,) * (rank - len(shape)) + shape
        if name in self._graph.constants:
            value = self._graph.constants[name]
            return self._made.constant(value.reshape([int(n) for n in widened]).transpose(inverse))
        if sum(size != 1 for size in widened) <= 1 and all(isinstance(size, int) for size in widened):
            turned = [int(widened[i]) for i in inverse]
            if turned[-1] > 1:
                return self._tiled(self._made.op("Reshape", name, self._made.ints([turned[-1]])), inner)
            return self._made.op("Reshape", name, self._made.ints(turned))
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
        summed = node.op in ("ReduceSum", "ReduceMean") and node.outputs[0] in self._floats
        if summed and sorted(perm[a] for a in axes) == list(range(rank - 1)):
            total = self._over_channels(source, node.op)
            if total is not None:
                self._keep(Node("Reshape", [total, self._made.ints([int(size) for size in shape])], node.outputs))
                self._moved = True
                return True
        inner = Node(
            node.op,
            [source, self._made.ints(sorted(perm[a] for a in axes))],
            [self._made.name()],
            dict(node.attributes),
        )
        if node.attributes.get("keepdims", 1):
            self._finish(node, inner, perm, [shape[i] for i in np.argsort(perm)])
            return True
        kept = [perm[a] for a in range(rank) if a not in axes]
        order = [sorted(kept).index(k) for k in kept]
        self._finish(node, inner, order, [shape[i] for i in np.argsort(order)])
        return True

    def _push_normalization(self, node: Node, source: str, perm: list[int]) -> bool:
        """`BatchNormalization` wants channels second, or there is a step for each of its passes."""
        shape, training = self._shapes.get(source), node.attributes.get("training_mode", 0)
        if shape is None or (training and node.attributes.get("momentum", 0.9) != 0) or perm == sorted(perm):
            return False
        if perm[1] == 0 and sum(not isinstance(size, int) for size in shape[1:]) <= 1:
            flat = self._made.op("Reshape", source, self._made.ints([1, int(shape[0]), -1]))
            name = self._made.name()
            self._keep(Node(node.op, [flat, *node.inputs[1:]], [name, *node.outputs[1:]], dict(node.attributes)))
            back = self._made.ints(size if isinstance(size, int) else -1 for size in shape)
            self._finish(node, Node("Reshape", [name, back], [self._made.name()]), perm, shape)
            return True
        if perm[1] != len(shape) - 1 or len(shape) < 3:
            return False
        _, scale, shift, mean, variance = node.inputs
        if training:
            found = self._over_channels(source, "ReduceMean")
            if found is None:
                return False
            centred = self._made.op("Sub", source, self._tiled(found, source))
            self._shapes[centred] = shape
            spread = self._over_channels(self._made.op("Mul", centred, centred), "ReduceMean", like=centred)
            assert spread is not None
            for result, name in zip((found, spread), node.outputs[1:], strict=False):
                self._keep(Node("Identity", [result], [name]))
            variance = spread
        else:
            centred = source
            if not self._is(mean, 0):
                centred = self._made.op("Sub", source, self._tiled(mean, source))
        epsilon = node.attributes.get("epsilon", 1e-5)
        if training or epsilon or not self._is(variance, 1):
            widened = self._made.op("Add", variance, self._made.scalar(epsilon, "float32"))
            scale = self._made.op("Div", scale, self._made.op("Sqrt", widened))
        if self._is(shift, 0):
            last = Node("Mul", [centred, self._tiled(scale, source)], [self._made.name()])
        else:
            scaled = self._made.op("Mul", centred, self._tiled(scale, source))
            last = Node("Add", [scaled, self._tiled(shift, source)], [self._made.name()])
        self._finish(node, last, perm, shape)
        return True

    def _is(self, name: str, value: float) -> bool:
        constant = self._graph.constants.get(name)
        return constant is not None and bool((constant == value).all())

    def _tiled(self, vector: str, inner: str) -> str:
        """``[C]`` for every example, ``[N, C]``: broadcast in longer runs, a quarter to two thirds of the time."""
        return self._made.op("Expand", vector, self._made.op("Shape", inner, start=len(self._shapes[inner]) - 2))

    def _over_channels(self, name: str, kind: str, like: str = "") -> str | None:
        """``[*spatial, N, C]`` -> sum or mean ``[C]``: by a product with ones, which streams, then over the batch."""
        shape = self._shapes.get(like or name)
        if shape is None or any(not isinstance(size, int) for size in (*shape[:-2], shape[-1])):
            return None
        pixels = math.prod(int(size) for size in shape[:-2])
        flat = self._made.op("Reshape", name, self._made.ints([pixels, -1]))
        ones = self._made.constant(np.full((1, pixels), 1 if kind == "ReduceSum" else 1 / pixels, np.float32))
        rows = self._made.op("Reshape", self._made.op("MatMul", ones, flat), self._made.ints([-1, int(shape[-1])]))
        return self._made.op(kind, rows, self._made.ints([0]), keepdims=0)

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
