"""Recurrent layers: what depends on the step before is one operator, the rest are matrix products over all steps.

PyTorch's own recurrent kernels hide their steps from tracing. Here, a layer's loop over time is an opaque operator
(``fedge.gru``, ``fedge.gru_backward``, ...), which `loops` lowers to an ONNX Scan; the input's projection, the slopes
of the activations and the weights' gradients are computed for all steps at once.

Tensors inside are ``[T, features, N]``: a matrix library repacks the right operand of a product, which had better be
the small state than the weights (19 instead of 25 us for 384 x 128 weights and a batch of 32).
Formulas: Cho et al. 2014 (arXiv 1406.1078) and Hochreiter & Schmidhuber 1997, in the variants of `torch.nn`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError

SCHEMAS = {
    "project": "(Tensor weight, Tensor x) -> Tensor",
    "rnn": "(Tensor x, Tensor first, Tensor weight, str activation, bool reverse) -> (Tensor, Tensor)",
    "rnn_backward": "(Tensor grad, Tensor slope, Tensor weight, bool reverse) -> (Tensor, Tensor)",
    "gru": "(Tensor gates, Tensor news, Tensor first, Tensor w_gates, Tensor w_new, Tensor bias, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gru_backward": "(Tensor grad, Tensor to_new, Tensor to_reset, Tensor to_update, Tensor reset, Tensor update, "
    "Tensor weight, bool reverse) -> (Tensor, Tensor, Tensor)",
    "lstm": "(Tensor gates, Tensor news, Tensor first, Tensor cell, Tensor w_gates, Tensor w_new, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "lstm_backward": "(Tensor grad, Tensor? last, Tensor to_cell, Tensor to_input, Tensor to_forget, "
    "Tensor to_output, Tensor to_new, Tensor forget, Tensor weight, bool reverse) -> (Tensor, Tensor, Tensor)",
}
"""The loops over time. They exist in traced graphs only, so they have shapes but no implementation in PyTorch."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"fedge::{_name}", _schema)

_Fake = Callable[..., Tensor | tuple[Tensor, ...]]


def _shapes(operator: str) -> Callable[[_Fake], _Fake]:
    register: Callable[[_Fake], _Fake] = torch.library.register_fake(operator)
    return register


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape) for t in tensors)


@_shapes("fedge::project")
def _(weight: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2])


@_shapes("fedge::rnn")
def _(x: Tensor, first: Tensor, weight: Tensor, activation: str, reverse: bool) -> tuple[Tensor, ...]:
    return _like(x, x)


@_shapes("fedge::rnn_backward")
def _(grad: Tensor, slope: Tensor, weight: Tensor, reverse: bool) -> tuple[Tensor, ...]:
    return _like(grad, grad[0])


@_shapes("fedge::gru")
def _(gates: Tensor, news: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _like(news, news, gates, news, news)


@_shapes("fedge::gru_backward")
def _(grad: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _like(torch.cat([grad] * 3, 1), grad, grad[0])


@_shapes("fedge::lstm")
def _(gates: Tensor, news: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _like(news, news, news, gates, news, news, news[0])


@_shapes("fedge::lstm_backward")
def _(grad: Tensor, *_: object) -> tuple[Tensor, ...]:
    return _like(torch.cat([grad] * 4, 1), grad[0], grad[0])


def _over_steps(left: Tensor, right: Tensor) -> Tensor:
    """The sum over steps of ``left right^T``, as one matrix product."""
    flat = [x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2]) for x in (left, right)]
    return flat[0] @ flat[1].t()


class _Project(torch.autograd.Function):
    """Weights ``[F, E]``, inputs ``[T, E, N]`` -> ``[T, F, N]``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        result: Tensor = torch.ops.fedge.project(weight, x)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, x = ctx.saved_tensors
        toward_x = torch.ops.fedge.project(weight.t(), grads[0]) if ctx.needs_input_grad[1] else None
        return _over_steps(grads[0], x), toward_x


class _Rnn(torch.autograd.Function):
    """Projected inputs ``[T, H, N]``, first state ``[H, N]``, weights ``[H, H]`` -> states ``[T, H, N]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, weight: Tensor, activation: str, reverse: bool) -> Tensor:
        states, before = torch.ops.fedge.rnn(x, first, weight, activation, reverse)
        ctx.save_for_backward(states, before, weight)
        ctx.activation, ctx.reverse = activation, reverse
        result: Tensor = states
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, before, weight = ctx.saved_tensors
        slope = 1 - states * states if ctx.activation == "tanh" else (states > 0).to(states.dtype)
        through, first = torch.ops.fedge.rnn_backward(grads[0], slope, weight, ctx.reverse)
        return through, first, _over_steps(through, before), None, None


class _Gru(torch.autograd.Function):
    """Projected gates ``[T, 2H, N]`` and news ``[T, H, N]``, first state, weights, bias ``[H, 1]`` -> ``[T, H, N]``."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, news: Tensor, first: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> Tensor:
        size = first.shape[0]
        states, *saved = torch.ops.fedge.gru(gates, news, first, *torch.split(weight, [2 * size, size]), bias, reverse)
        ctx.save_for_backward(*saved, weight)
        ctx.reverse = reverse
        result: Tensor = states
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        before, gates, news, inners, weight = ctx.saved_tensors
        size = before.shape[1]
        reset, update = torch.split(gates, size, 1)
        keep = 1 - update
        to_new = keep * (1 - news * news)
        to_update = (before - news) * (update * keep)
        to_reset = inners * (reset * (1 - reset))
        through, new, first = torch.ops.fedge.gru_backward(
            grads[0], to_new, to_reset, to_update, reset, update, weight, ctx.reverse
        )
        toward_weight = _over_steps(through, before)
        gate, inner = torch.split(through, [2 * size, size], 1)
        return gate, new, first, toward_weight, inner.sum((0, 2)).unsqueeze(1), None


class _Lstm(torch.autograd.Function):
    """Projected gates ``[T, 3H, N]`` (input, forget, output) and news, first state and cell, weights in that order.

    Returns states ``[T, H, N]`` and the last cell ``[H, N]``.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, news: Tensor, first: Tensor, cell: Tensor, weight: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        size = first.shape[0]
        parts = torch.split(weight, [3 * size, size])
        states, *saved, last = torch.ops.fedge.lstm(gates, news, first, cell, *parts, reverse)
        ctx.save_for_backward(*saved, weight)
        ctx.set_materialize_grads(False)
        ctx.reverse = reverse
        return states, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        before, cells, gates, news, curved, weight = ctx.saved_tensors
        size = before.shape[1]
        enter, forget, leave = torch.split(gates, size, 1)
        slopes = gates * (1 - gates)
        to_input, to_forget, to_output = (
            factor * slope for factor, slope in zip((news, cells, curved), torch.split(slopes, size, 1), strict=True)
        )
        to_cell, to_new = leave * (1 - curved * curved), enter * (1 - news * news)
        grad = torch.zeros_like(news) if grads[0] is None else grads[0]
        through, first, cell = torch.ops.fedge.lstm_backward(
            grad, grads[1], to_cell, to_input, to_forget, to_output, to_new, forget, weight, ctx.reverse
        )
        gate, new = torch.split(through, [3 * size, size], 1)
        return gate, new, first, cell, _over_steps(through, before), None


Layer = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], bool], tuple[Tensor, ...]]
"""``layer(x, states, weights, reverse)``: ``[T, E, N]``, ``[H, N]`` each -> ``[T, H, N]`` and last states."""


def _project(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
    """``weight x + biases`` in every step."""
    if biases:
        # As a column of the weights, the bias costs no pass over what comes out, and its gradient no sum.
        weight = torch.cat([weight, sum(biases[1:], biases[0]).unsqueeze(1)], 1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    result: Tensor = _Project.apply(weight, x)  # type: ignore[no-untyped-call]
    return result


def _last(states: Tensor, reverse: bool) -> Tensor:
    return states[0 if reverse else -1]


def _rnn_layer(activation: str) -> Layer:
    def layer(x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        w_input, w_hidden, *biases = weights
        projected = _project(x, w_input, *biases)
        states = _Rnn.apply(projected, start[0], w_hidden, activation, reverse)  # type: ignore[no-untyped-call]
        return states, _last(states, reverse)

    return layer


def _gru_layer(x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    w_input, w_hidden, *biases = weights
    size = w_hidden.shape[1]
    # The hidden bias of the new state is inside the reset gate's product, all others are constants of a step.
    w_gates, w_new = torch.split(w_input, [2 * size, size])
    outer, inner = (torch.split(bias, [2 * size, size]) for bias in biases or [torch.zeros(3 * size)] * 2)
    bias = inner[1]
    gates = _project(x, w_gates, *([outer[0], inner[0]] if biases else []))
    news = _project(x, w_new, *([outer[1]] if biases else []))
    states = _Gru.apply(gates, news, start[0], w_hidden, bias.unsqueeze(1), reverse)  # type: ignore[no-untyped-call]
    return states, _last(states, reverse)


def _gates_first(weight: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's rows (input, forget, new, output) as gates and news."""
    enter, forget, new, leave = weight.chunk(4)
    return torch.cat([enter, forget, leave]), new


def _lstm_layer(x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    w_input, w_hidden, *biases = weights
    outer = [_gates_first(t) for t in (w_input, *biases)]
    gates, news = (_project(x, *part) for part in zip(*outer, strict=True))
    weight = torch.cat(_gates_first(w_hidden))
    states, cell = _Lstm.apply(gates, news, *start, weight, reverse)  # type: ignore[no-untyped-call]
    return states, _last(states, reverse), cell


def _projected_lstm_layer(
    x: Tensor, start: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, ...]:
    """With ``proj_size`` (Sak et al. 2014, arXiv 1402.1128): rare enough for autograd, one step after the other."""
    w_input, w_hidden, *biases, w_projection = weights
    projected = _project(x, w_input, *biases)
    (state, cell), steps = start, range(x.shape[0])
    states: dict[int, Tensor] = {}
    for t in reversed(steps) if reverse else steps:
        enter, forget, new, leave = (projected[t] + w_hidden @ state).chunk(4)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        states[t] = state = w_projection @ (torch.sigmoid(leave) * torch.tanh(cell))
    return torch.stack([states[t] for t in steps]), state, cell


_LAYERS: dict[str, Layer] = {
    "rnn_tanh": _rnn_layer("tanh"),
    "rnn_relu": _rnn_layer("relu"),
    "gru": _gru_layer,
    "lstm": _lstm_layer,
}


def _network(
    kind: str,
    x: Tensor,
    start: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The signature (less the kind) and the result of `torch.gru` and its like."""
    if dropout > 0 and training and layers > 1:
        raise ExportError(f"{kind} drops with p={dropout:g} between layers, but this step takes no seed; use dropout=0")
    x = x.transpose(0, 1) if batch_first else x
    if not isinstance(x.shape[0], int):
        raise ExportError(f"{kind} runs over the batch dimension; give [N, T, features] with batch_first=True")
    sequence = x.transpose(1, 2)
    starts = [start] if isinstance(start, Tensor) else list(start)
    layer = _LAYERS[kind]
    given = 4 if has_bias else 2
    if len(starts) == 2 and starts[0].shape[2] != starts[1].shape[2]:
        layer, given = _projected_lstm_layer, given + 1
    directions = 2 if bidirectional else 1
    lasts: list[tuple[Tensor, ...]] = []
    for i in range(layers):
        results = []
        for place in range(i * directions, (i + 1) * directions):
            first = [s[place].t() for s in starts]
            own = weights[place * given : (place + 1) * given]
            states, *last = layer(sequence, first, own, place % directions == 1)
            results.append(states)
            lasts.append(tuple(last))
        sequence = torch.cat(results, 1) if bidirectional else results[0]
    output = sequence.transpose(1, 2)
    return (
        output.transpose(0, 1) if batch_first else output,
        *(torch.stack([t.t() for t in parts]) for parts in zip(*lasts, strict=True)),
    )


Biases = Tensor | None


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, state: Tensor, w_input: Tensor, w_hidden: Tensor, *biases: Biases) -> Tensor:
        return activation(F.linear(x, w_input, *biases[:1]) + F.linear(state, w_hidden, *biases[1:]))

    return cell


def _gru_cell(x: Tensor, state: Tensor, w_input: Tensor, w_hidden: Tensor, *biases: Biases) -> Tensor:
    outer = F.linear(x, w_input, *biases[:1]).chunk(3, -1)
    inner = F.linear(state, w_hidden, *biases[1:]).chunk(3, -1)
    reset, update = (torch.sigmoid(outer[i] + inner[i]) for i in range(2))
    new = torch.tanh(outer[2] + reset * inner[2])
    return new + update * (state - new)


def _lstm_cell(
    x: Tensor, states: Sequence[Tensor], w_input: Tensor, w_hidden: Tensor, *biases: Biases
) -> tuple[Tensor, Tensor]:
    total = F.linear(x, w_input, *biases[:1]) + F.linear(states[0], w_hidden, *biases[1:])
    enter, forget, new, leave = total.chunk(4, -1)
    cell = torch.sigmoid(forget) * states[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


_CELLS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "rnn_tanh_cell": _rnn_cell(torch.tanh),
    "rnn_relu_cell": _rnn_cell(torch.relu),
    "gru_cell": _gru_cell,
    "lstm_cell": _lstm_cell,
}
"""PyTorch's fused cells look at the batch size, which fixes it."""


class RecurrentMode(TorchFunctionMode):
    """While active, recurrent layers are computed with the operators of this module."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the recurrent functions, pass all others on."""
        # By name: torch.nn calls these through another object than torch.gru.
        name = getattr(func, "__name__", "")
        if name in _LAYERS and len(args) == 9:
            if not isinstance(args[3], bool):
                raise ExportError(f"{name} over a packed sequence is not supported; give it padded, [N, T, features]")
            return _network(name, *args)
        if name in _CELLS:
            return _CELLS[name](*args)
        return func(*args, **(kwargs or {}))
