"""ATen -> ONNX: walk a traced graph and emit default-domain operators through tables of rules."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import fx

from edge_client.errors import ExportError
from export.alternatives import nearest
from export.graph import ELEMENT_TYPES, Array, Builder, Graph, Port
from export.trace import MODULE, Traced

Size = int | torch.SymInt
Choose = Callable[[Any], Any]
"""From a convolution's geometry (`formulation.Layer`) to the formulation that computes it."""


@dataclass(frozen=True)
class Value:
    """A tensor in the ONNX graph: its name, its sizes (the batch is symbolic) and its dtype."""

    name: str
    shape: tuple[Size, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def static(self, *axes: int) -> tuple[int, ...]:
        """The sizes of the given axes (all when none is given).

        Raises:
            ExportError: one of them depends on the batch.
        """
        sizes = [self.shape[a] for a in axes or range(self.rank)]
        if not all(isinstance(size, int) for size in sizes):
            raise ExportError(f"size {sizes} depends on the batch where a fixed size is needed")
        return tuple(int(size) for size in sizes)


class Lowering(Builder):
    """A builder that also knows sizes, so that rules read like the mathematics they state."""

    def __init__(self, graph: Graph, batch: str | None, choose: Choose, differentiated: bool = False) -> None:
        """``batch`` names an input whose first size is the batch; ``differentiated``: a backward pass follows."""
        super().__init__(graph)
        self.choose = choose
        self.differentiated = differentiated
        self.constants: frozenset[str] = frozenset()
        self.readers: tuple[fx.Node, ...] = ()  # of the value that is being lowered
        self._batch = batch
        self._batch_size: str | None = None

    def size(self, size: Size) -> str:
        """A size as an int64 tensor ``[1]``."""
        return self.ints([size]) if isinstance(size, int) else self._expression(size.node.expr)

    def _expression(self, expression: Any) -> str:
        if expression.is_Integer:
            return self.ints([int(expression)])
        if expression.is_Symbol and self._batch is not None:
            if self._batch_size is None:
                self._batch_size = self.op("Shape", self._batch, start=0, end=1)
            return self._batch_size
        kind = {"Mul": "Mul", "Add": "Add", "FloorDiv": "Div", "CleanDiv": "Div"}.get(type(expression).__name__)
        if kind is None:
            raise ExportError(f"a size that depends on the batch as {expression} is not supported")
        parts = [self._expression(part) for part in expression.args]
        result = parts[0]
        for part in parts[1:]:
            result = self.op(kind, result, part)
        return result

    def _real(self, expression: Any) -> str:
        """A real number such as ``2 / elements`` as a float32 scalar."""
        if expression.is_number:
            return self.scalar(float(expression), "float32")
        name = type(expression).__name__
        if name == "ToFloat":
            return self.cast(self.op("Squeeze", self._expression(expression.args[0])), "int64", "float32")
        kind = {"Mul": "Mul", "Add": "Add", "FloatTrueDiv": "Div", "IntTrueDiv": "Div", "Pow": "Pow"}.get(name)
        if kind is None:
            whole = self._expression(expression)
            return self.cast(self.op("Squeeze", whole), "int64", "float32")
        parts = [self._real(part) for part in expression.args]
        result = parts[0]
        for part in parts[1:]:
            result = self.op(kind, result, part)
        return result

    def sizes(self, shape: Sequence[Size]) -> str:
        """A shape as a 1-D int64 tensor."""
        if all(isinstance(size, int) for size in shape):
            return self.ints([int(size) for size in shape])
        return self.op("Concat", *[self.size(size) for size in shape], axis=0)

    def number(self, value: object, dtype: str) -> str:
        """A Python or symbolic number as a 0-D tensor."""
        if isinstance(value, torch.SymInt):
            return self.cast(self.op("Squeeze", self.size(value)), "int64", dtype)
        if isinstance(value, torch.SymFloat):
            return self.cast(self._real(value.node.expr), "float32", dtype)
        if isinstance(value, bool | int | float):
            return self.scalar(value, dtype)
        raise ExportError(f"a number of type {type(value).__name__} that depends on the batch is not supported")

    def cast(self, name: str, found: str, wanted: str) -> str:
        """``name`` in another dtype."""
        return name if found == wanted else self.op("Cast", name, to=_element(wanted))

    def reshape(self, name: str, shape: Sequence[Size]) -> str:
        """``name`` in another shape; one size may depend on the batch without costing a node."""
        symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        if len(symbolic) == 1 and 0 not in shape:
            return self.op("Reshape", name, self.ints([-1 if i in symbolic else int(s) for i, s in enumerate(shape)]))
        return self.op("Reshape", name, self.sizes(shape))

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """``name`` with its axes in the given order."""
        order = list(order)
        return name if order == sorted(order) else self.op("Transpose", name, perm=order)

    def slice(self, name: str, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], *steps: int) -> str:
        """``name[start:end:step]`` along the given axes; one step for all of them."""
        extra = [self.ints([steps[0]] * len(axes))] if steps and steps[0] != 1 else []
        return self.op("Slice", name, self.ints(starts), self.ints(ends), self.ints(axes), *extra)

    def reduce(self, kind: str, name: str, axes: Sequence[int], keep: bool = False) -> str:
        """A reduction over axes; all of them when none is given."""
        extra = [self.ints(axes)] if axes else []
        return self.op(kind, name, *extra, keepdims=int(keep))

    def zeros(self, shape: Sequence[Size], dtype: str, value: float = 0) -> str:
        """A tensor filled with one value."""
        filler = self.attribute_tensor(np.array([value], dtype))
        return self.op("ConstantOfShape", self.sizes(shape), value=filler)

    @staticmethod
    def attribute_tensor(value: Array) -> Any:
        """A tensor that goes into a node's attribute."""
        return numpy_helper.from_array(value)


Rule = Callable[..., str | tuple[str | None, ...] | Value]
"""``rule(lowering, output, *args, **kwargs)``: ``output`` is a Value without a name; returns the result's name(s)."""


def _element(dtype: str) -> int:
    return int(ELEMENT_TYPES[dtype])


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def operator_name(target: object) -> str:
    """``aten.convolution_backward.default`` -> ``aten.convolution_backward``: the key of both tables."""
    return ".".join(str(target).split(".")[:2])


def lower(traced: Traced, rules: Mapping[str, Rule], choose: Choose, constants: Iterable[str] = ()) -> Graph:
    """Lower a traced graph with a table from operator to rule; ``choose`` picks the formulation of a convolution.

    ``constants`` names inputs whose values will be known when the graph is loaded.

    Raises:
        ExportError: an operator has no rule; the message names the module it came from.
    """
    outputs = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    graph = Graph([], [])
    backward = any(operator_name(node.target).endswith("_backward") for node in traced.graph.nodes)
    builder = Lowering(graph, traced.batched[0] if traced.batched else None, choose, backward)
    builder.constants = frozenset(constants)
    values: dict[fx.Node, Any] = {}
    placeholders = iter(traced.inputs)
    for node in traced.graph.nodes:
        found = node.meta.get("val")
        if node.op == "placeholder":
            values[node] = described(next(placeholders), found)
            graph.inputs.append(_port(values[node]))
        elif node.op == "get_attr":
            constant = getattr(traced.owner, str(node.target)).detach().cpu().numpy()
            values[node] = described(builder.constant(constant), found)
        elif node.op == "call_function":
            values[node] = _lower_node(builder, node, values, rules)
        for value in values[node] if isinstance(values.get(node), tuple) else [values.get(node)]:
            if isinstance(value, Value):
                graph.shapes[value.name] = _port(value).shape
    for name, node in zip(traced.outputs, outputs, strict=True):
        # Every output gets its own name, also where two are one value or an input goes straight through.
        builder.output(values[node].name, _port(described(name, node.meta["val"])))
    return graph


def _lower_node(builder: Lowering, node: fx.Node, values: Mapping[fx.Node, Any], rules: Mapping[str, Rule]) -> Any:
    found: Any = node.meta.get("val")
    if isinstance(found, int | float | torch.SymInt | torch.SymFloat):
        return found
    arguments: Any = fx.map_arg(node.args, lambda n: values[n])
    named: Any = fx.map_arg(node.kwargs, lambda n: values[n])
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    name = operator_name(node.target)
    rule = rules.get(name)
    if rule is None:
        instead = nearest(name, rules)
        advice = f"the nearest that has one: {instead}" if instead else "write it in elementary operators of torch"
        raise ExportError(f"module {_origin(node)!r} uses {name}, which has no rule; {advice}")
    builder.readers = tuple(node.users)
    shape = described("", found) if isinstance(found, torch.Tensor) else _parts(node, found)
    try:
        result = rule(builder, shape, *arguments, **named)
    except ExportError as error:
        raise ExportError(f"module {_origin(node)!r}, {name}: {error}") from error
    if isinstance(result, tuple):
        return tuple(None if r is None or f is None else described(r, f) for r, f in zip(result, found, strict=True))
    return result if isinstance(result, Value) else described(result, found)


def _parts(node: fx.Node, found: Sequence[Any]) -> list[Value | None]:
    """An operator's several results; None for those that nothing reads."""
    read = {user.args[1] for user in node.users}
    return [described("", part) if i in read and part is not None else None for i, part in enumerate(found)]


def _origin(node: fx.Node) -> str:
    """The module of a node; for a node of the backward pass, that of the nearest value it reads."""
    queue, seen = [node], {node}
    for current in queue:
        if MODULE in current.meta:
            return str(current.meta[MODULE]) or "(root)"
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return "(loss)"


def described(name: str, found: Any) -> Value:
    """A Value for a traced tensor (None where an operator leaves an output out)."""
    if found is None:
        return Value(name, (), "none")
    return Value(name, tuple(found.shape), dtype_name(found.dtype))


def _port(value: Value) -> Port:
    return Port(value.name, tuple(s if isinstance(s, int) else None for s in value.shape), value.dtype)
