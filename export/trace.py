"""One training step as a graph of ATen operators.

The step (forward, loss, backward, update) is an ordinary function over named tensors. It runs once on fake tensors
whose only symbolic size is the batch, and `make_fx` writes down what autograd does.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from edge_client.errors import ExportError, FedgeError
from edge_client.manifest import Feature
from export import modes
from export.decompositions import DECOMPOSITIONS
from export.statistics import cumulative_averages

Step = Callable[[dict[str, Tensor]], dict[str, Tensor]]
MODULE = "fedge_module"
"""Key in an fx node's meta: the path of the module that the node came from."""

# Lowered as they are, with fewer passes over memory than their decompositions.
_KEPT = (
    "slice_backward",
    "select_backward",
    "diagonal_backward",
    "embedding_dense_backward",
    "_log_softmax_backward_data",
    "pad",
    "_adaptive_avg_pool2d",
    *(f"max_pool{n}d_with_indices_backward" for n in (2, 3)),
    *(f"{kind}_pad{n}d{way}" for kind in ("reflection", "replication") for n in (1, 2, 3) for way in ("", "_backward")),
    "roll",
    "im2col",
    "col2im",
    "unfold_backward",
    *(f"{name}_backward" for name in ("threshold", "sigmoid", "tanh", "gelu", "hardtanh", "leaky_relu", "elu")),
    *(f"{name}{way}" for name in ("silu", "mish", "hardsigmoid", "hardswish", "softplus") for way in ("", "_backward")),
    *("_prelu_kernel", "_prelu_kernel_backward", "log_sigmoid_forward", "log_sigmoid_backward"),
    "_softmax_backward_data",
    # Its decomposition fixes the batch size without saying so.
    *(f"reflection_pad{rank}d_backward" for rank in (1, 2, 3)),
    *(f"native_{name}_norm_backward" for name in ("batch", "layer", "group")),
)


# By name, what returns new values of the arguments that an operator writes into, after its own results.
_RETURNING = {"_native_batch_norm_legit": torch.ops.aten._native_batch_norm_legit_functional.default}


@dataclass(frozen=True)
class Traced:
    """A graph of ATen operators with the names of its inputs and outputs, in order."""

    graph: fx.Graph
    owner: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batched: tuple[str, ...]
    """Inputs whose first dimension is the batch."""


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's own decompositions into core ATen, less those that are lowered directly."""
    # Kept, because PyTorch asks every operator that it has: a third of the time of tracing a small step.
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    kept = {op: rule for op, rule in table.items() if _base_name(op) not in _KEPT}
    return kept | DECOMPOSITIONS


def _base_name(op: Any) -> str:
    return str(op).removeprefix("aten.").split(".")[0]


def trace(function: Step, fixed: Mapping[str, Tensor], batched: Sequence[Feature], module: nn.Module) -> Traced:
    """Trace ``function`` over ``fixed`` tensors and batches of ``batched`` features, with a symbolic batch size.

    ``module`` is the one whose submodules the nodes are attributed to.

    Raises:
        ExportError: the module's Python code cannot be traced, or fixes the batch size.
    """
    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    batch = mode.from_tensor(torch.empty(11), source=ConstantSource("batch"), symbolic_context=context).shape[0]
    # Clones: one tensor given twice, as weight and as slot, would become one fake tensor and one input.
    clones = {name: tensor.clone() for name, tensor in fixed.items()}
    values: dict[str, Tensor] = {name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in clones.items()}
    with mode:
        values |= {f.name: torch.empty((batch, *f.shape), dtype=getattr(torch, f.dtype)) for f in batched}
    names: list[str] = []

    def positional(*tensors: Tensor) -> list[Tensor]:
        results = function(dict(zip(values, tensors, strict=True)))
        names.extend(results)
        return list(results.values())

    # With the fake mode active, torch.zeros(batch, ...) inside the model is symbolic too.
    # Composite operators written in C++ would fix the batch; the Python dispatcher has them in terms of symbolic sizes.
    with (
        _attribution(module) as stack,
        modes.tracing(),
        cumulative_averages(module),
        mode,
        enable_python_dispatcher(),
    ):
        try:
            traced = make_fx(positional, decomposition_table=decompositions())(*values.values())
        except FedgeError:
            raise
        except Exception as error:
            where = f"module {stack[-1] or type(module).__name__!r}" if stack else "the loss"
            raise ExportError(f"{where} cannot be traced: {_first_line(error)}") from error
    if not isinstance(batch, torch.SymInt) or batch.node.maybe_as_int() is not None:
        raise ExportError("the model fixes the batch size; write sizes as x.shape[0] or -1 so that any batch fits")
    return Traced(
        _cleaned(traced.graph), traced, tuple(values), tuple(names), tuple(feature.name for feature in batched)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextmanager
def _attribution(module: nn.Module) -> Any:
    """Mark every node that is traced inside a submodule's forward with the submodule's path."""
    stack: list[str] = []
    starts: list[fx.Node | None] = []

    def newest() -> fx.Node | None:
        mode = get_proxy_mode()
        return mode.tracer.graph._root.prev if mode is not None else None

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            stack.append(path)
            starts.append(newest())

        return hook

    def leave(*_: object) -> None:
        path, node, last = stack.pop(), starts.pop(), newest()
        while node is not None and node is not last:
            node = node.next
            node.meta.setdefault(MODULE, path)

    with ExitStack() as hooks:
        for path, submodule in module.named_modules():
            for handle in (
                submodule.register_forward_pre_hook(enter(path)),
                submodule.register_forward_hook(leave),
            ):
                hooks.callback(handle.remove)
        yield stack


def _cleaned(graph: fx.Graph) -> fx.Graph:
    _refuse_partial_writes(graph)
    _functionalize(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and _base_name(node.target) in ("alias", "detach", "clone", "lift_fresh_copy"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and _base_name(node.target) == "_assert_async":
            graph.erase_node(node)  # a check of values, which a graph has no way to fail
    graph.eliminate_dead_code()
    merged = fx_graph_cse(graph)
    merged.eliminate_dead_code()
    return merged


def _functionalize(graph: fx.Graph) -> None:
    """Turn operators that write into fresh values (``relu_``, running statistics) into those that return the result."""
    order = {node: i for i, node in enumerate(graph.nodes)}

    def replace_later(written: fx.Node, by: fx.Node, since: fx.Node) -> None:
        for user in list(written.users):
            if user not in (since, by) and order.get(user, math.inf) > order[since]:
                user.replace_input_with(written, by)

    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = _base_name(target)
        written = [a for i, a in enumerate(node.args) if _writes(target, i) and a is not None]
        where = node.meta.get(MODULE) or "the model"
        if any(not isinstance(a, fx.Node) or _viewed(a).op == "placeholder" for a in written):
            raise ExportError(f"module {where!r} changes a parameter or an input in its forward; make it a buffer")
        if name in _RETURNING:
            node.target = _RETURNING[name]
            found = len(node.meta["val"])
            node.meta["val"] = (*node.meta["val"], *(a.meta["val"] for a in written))
            for place, value in enumerate(written):
                with graph.inserting_after(node):
                    after = graph.call_function(operator.getitem, (node, found + place))
                after.meta = {"val": value.meta["val"]} | {k: v for k, v in node.meta.items() if k == MODULE}
                replace_later(value, after, node)
            continue
        if name == "copy_" and _alike(*node.args[:2]):
            replace_later(written[0], node.args[1], node)
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
            continue
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
        overload = getattr(packet, target._overloadname, None)
        if overload is None or len(written) != 1:
            raise ExportError(f"module {where!r} uses {target}, which writes into its arguments; replace it")
        node.target = overload
        replace_later(written[0], node, node)


def _viewed(node: fx.Node) -> fx.Node:
    """What an alias is one of."""
    while node.op == "call_function" and _base_name(node.target) in ("alias", "detach"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _writes(target: torch._ops.OpOverload, place: int) -> bool:
    alias = target._schema.arguments[place].alias_info
    return alias is not None and alias.is_write


def _alike(first: fx.Node, second: fx.Node) -> bool:
    one, two = first.meta["val"], second.meta["val"]
    return bool(one.dtype == two.dtype and one.shape == two.shape)


def _refuse_partial_writes(graph: fx.Graph) -> None:
    """Writing into a slice or another view changes the tensor that it shows, which no later pass follows."""
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        if any(isinstance(a, fx.Node) and _is_view(a) for i, a in enumerate(node.args) if _writes(target, i)):
            raise ExportError(
                f"module {node.meta.get(MODULE) or 'the model'!r} writes into a part of a tensor "
                f"({_base_name(target)}), which is not supported; use torch.cat, torch.where or an out-of-place scatter"
            )


def _is_view(node: fx.Node) -> bool:
    """Whether a value shares its memory with a larger one or another shape of it."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or _base_name(target) in ("alias", "detach"):
        return False
    return any(a.alias_info is not None and not a.alias_info.is_write for a in target._schema.returns)
