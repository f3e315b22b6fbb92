"""Loops over time: the operators of `recurrent` as an ONNX Scan, whatever their length.

Unrolled, a loop takes as long or longer (GRU and LSTM, 128 units, batch 32, 20 to 160 steps), because what is kept of
the steps must be joined and cut apart; and its graph grows with the sequence.
"""

from collections.abc import Callable, Sequence

from export.graph import Branch, Node, Port
from export.lower import Lowering, Rule, Value

Step = Callable[[Sequence[str], Sequence[str]], tuple[Sequence[str], Sequence[str]]]
"""``step(states, inputs)`` emits one step: new states, and what is kept of the step; all are ``[features, N]``."""


def scan(
    b: Lowering,
    step: Step,
    inputs: Sequence[Value],
    states: Sequence[str],
    size: int,
    kept: Sequence[Value | None],
    reverse: bool,
) -> tuple[list[str], list[str | None]]:
    """Emit a loop over ``inputs`` ``[T, features, N]`` from first ``states`` ``[size, N]``.

    ``kept`` describe what a step keeps, None for what nothing reads, as in evaluation, where there are no gradients.
    Returns the last states, and what was kept, ``[T, features, N]`` each.
    """

    def ports(names: Sequence[str], features: Sequence[int]) -> list[Port]:
        return [Port(name, (count, None), "float32") for name, count in zip(names, features, strict=True)]

    carried, scanned = [b.name() for _ in states], [b.name() for _ in inputs]
    outer, b.graph.nodes = b.graph.nodes, []
    after, every = step(carried, scanned)
    parts = [name for name, value in zip(every, kept, strict=True) if value is not None]
    made: list[str] = []
    for name in (*after, *parts):
        # Each output of the body is a value of its own that a node of the body makes.
        fresh = name not in made and name not in carried
        made.append(name if fresh else b.op("Identity", name))
    inner, b.graph.nodes = b.graph.nodes, outer
    sizes = [size] * len(states)
    body = Branch(
        inner,
        ports(made, [*sizes, *(_features(value) for value in kept if value is not None)]),
        ports([*carried, *scanned], [*sizes, *(_features(value) for value in inputs)]),
    )
    attributes = {
        "num_scan_inputs": len(scanned),
        "scan_input_directions": [int(reverse)] * len(scanned),
        "scan_output_directions": [int(reverse)] * len(parts),
    }
    outputs = [b.name() for _ in made]
    b.graph.nodes.append(
        Node("Scan", [*states, *(value.name for value in inputs)], outputs, attributes, {"body": body})
    )
    stacked = iter(outputs[len(states) :])
    return outputs[: len(states)], [next(stacked) if value is not None else None for value in kept]


def _features(value: Value) -> int:
    return value.static(1)[0]


def _project(b: Lowering, out: Value, weight: Value, x: Value) -> str:
    return b.op("MatMul", weight.name, x.name)


def _turned(b: Lowering, weight: Value) -> str:
    """The transposed weights, once for all steps.

    With three dimensions: a plain transpose would be made a flag of each product, which costs half as much again.
    """
    rows, columns = weight.static()
    lifted = b.op("Reshape", weight.name, b.ints([1, rows, columns]))
    return b.op("Reshape", b.transpose(lifted, [0, 2, 1]), b.ints([columns, rows]))


def _rnn(
    b: Lowering, out: Sequence[Value | None], x: Value, first: Value, weight: Value, activation: str, reverse: bool
) -> tuple[str | None, ...]:
    size = first.static(0)[0]

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state = b.op(activation.capitalize(), b.op("Gemm", weight.name, states[0], inputs[0]))
        return [state], [state, states[0]]

    return tuple(scan(b, step, [x], [first.name], size, out, reverse)[1])


def _rnn_backward(
    b: Lowering, out: Sequence[Value | None], grad: Value, slope: Value, weight: Value, reverse: bool
) -> tuple[str | None, ...]:
    size = _features(grad)
    turned = _turned(b, weight)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        through = b.op("Mul", b.op("Add", states[0], inputs[0]), inputs[1])
        return [b.op("Gemm", turned, through)], [through]

    zero = b.zeros([size, grad.shape[2]], "float32")
    last, stacked = scan(b, step, [grad, slope], [zero], size, out[:1], not reverse)
    return stacked[0], last[0]


def _gru(
    b: Lowering,
    out: Sequence[Value | None],
    gates: Value,
    news: Value,
    first: Value,
    w_gates: Value,
    w_new: Value,
    bias: Value,
    reverse: bool,
) -> tuple[str | None, ...]:
    size = first.static(0)[0]

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state = states[0]
        gate = b.op("Sigmoid", b.op("Gemm", w_gates.name, state, inputs[0]))
        reset, update = b.ops("Split", 2, gate, axis=0, num_outputs=2)
        inner = b.op("Gemm", w_new.name, state, bias.name)
        new = b.op("Tanh", b.op("Add", inputs[1], b.op("Mul", reset, inner)))
        after = b.op("Add", new, b.op("Mul", update, b.op("Sub", state, new)))
        return [after], [after, state, gate, new, inner]

    return tuple(scan(b, step, [gates, news], [first.name], size, out, reverse)[1])


def _gru_backward(
    b: Lowering,
    out: Sequence[Value | None],
    grad: Value,
    to_new: Value,
    to_reset: Value,
    to_update: Value,
    reset: Value,
    update: Value,
    weight: Value,
    reverse: bool,
) -> tuple[str | None, ...]:
    size = _features(grad)
    turned = _turned(b, weight)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        given, toward_new, toward_reset, toward_update, opened, kept = inputs
        total = b.op("Add", states[0], given)
        new = b.op("Mul", total, toward_new)
        parts = b.op("Mul", new, toward_reset), b.op("Mul", total, toward_update), b.op("Mul", new, opened)
        through = b.op("Concat", *parts, axis=0)
        return [b.op("Gemm", turned, through, b.op("Mul", total, kept))], [through, new]

    zero = b.zeros([size, grad.shape[2]], "float32")
    inputs = [grad, to_new, to_reset, to_update, reset, update]
    last, stacked = scan(b, step, inputs, [zero], size, out[:2], not reverse)
    return (*stacked, last[0])


def _lstm(
    b: Lowering,
    out: Sequence[Value | None],
    gates: Value,
    news: Value,
    first: Value,
    cell: Value,
    w_gates: Value,
    w_new: Value,
    reverse: bool,
) -> tuple[str | None, ...]:
    size = first.static(0)[0]

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state, old = states
        gate = b.op("Sigmoid", b.op("Gemm", w_gates.name, state, inputs[0]))
        new = b.op("Tanh", b.op("Gemm", w_new.name, state, inputs[1]))
        enter, forget, leave = b.ops("Split", 3, gate, axis=0, num_outputs=3)
        held = b.op("Add", b.op("Mul", forget, old), b.op("Mul", enter, new))
        curved = b.op("Tanh", held)
        after = b.op("Mul", leave, curved)
        return [after, held], [after, state, old, gate, new, curved]

    last, stacked = scan(b, step, [gates, news], [first.name, cell.name], size, out[:6], reverse)
    return (*stacked, last[1])


def _lstm_backward(
    b: Lowering,
    out: Sequence[Value | None],
    grad: Value,
    last: Value | None,
    to_cell: Value,
    to_input: Value,
    to_forget: Value,
    to_output: Value,
    to_new: Value,
    forget: Value,
    weight: Value,
    reverse: bool,
) -> tuple[str | None, ...]:
    size = _features(grad)
    turned = _turned(b, weight)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        given, toward_cell, toward_input, toward_forget, toward_output, toward_new, kept = inputs
        total = b.op("Add", states[0], given)
        cell = b.op("Add", states[1], b.op("Mul", total, toward_cell))
        parts = [b.op("Mul", cell, toward) for toward in (toward_input, toward_forget)]
        parts += [b.op("Mul", total, toward_output), b.op("Mul", cell, toward_new)]
        through = b.op("Concat", *parts, axis=0)
        return [b.op("Gemm", turned, through), b.op("Mul", cell, kept)], [through]

    zero = b.zeros([size, grad.shape[2]], "float32")
    inputs = [grad, to_cell, to_input, to_forget, to_output, to_new, forget]
    start = [zero, last.name if last is not None else zero]
    ends, stacked = scan(b, step, inputs, start, size, out[:1], not reverse)
    return (stacked[0], *ends)


RECURRENT: dict[str, Rule] = {
    "fedge.project": _project,
    "fedge.rnn": _rnn,
    "fedge.rnn_backward": _rnn_backward,
    "fedge.gru": _gru,
    "fedge.gru_backward": _gru_backward,
    "fedge.lstm": _lstm,
    "fedge.lstm_backward": _lstm_backward,
}
