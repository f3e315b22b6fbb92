"""Loops over time: the operators of `recurrent` as ONNX, short ones unrolled, long ones as a Scan.

A step is written once, as a function that emits nodes; it goes into the graph once for each step, or once into the
body of a Scan, which costs time in every step but keeps graph and export small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from export.graph import Branch, Node, Port
from export.lower import Lowering, Rule, Value

MOST_UNROLLED = 64
"""Longest sequence that is unrolled."""

Step = Callable[[Sequence[str], Sequence[str]], tuple[Sequence[str], Sequence[str]]]
"""``step(states, inputs)`` emits one step: new states, and what is kept of the step; all are ``[features, N]``."""


@dataclass(frozen=True)
class Loop:
    """What a loop over time runs over: ``inputs`` are ``[features, T, N]``."""

    inputs: Sequence[Value]
    reverse: bool

    @property
    def steps(self) -> int:
        """T."""
        return self.inputs[0].static(1)[0]

    def run(
        self, b: Lowering, states: Sequence[tuple[str, int]], kept: Sequence[int], step: Step
    ) -> tuple[list[str], list[str]]:
        """Emit the loop from first ``states`` (name, features); ``kept`` are the features of what a step keeps.

        Returns the last states, and what was kept, stacked: ``[features, T, N]``.
        """
        if self.steps <= MOST_UNROLLED:
            return self._unrolled(b, [name for name, _ in states], kept, step)
        return self._scan(b, states, kept, step)

    def _unrolled(
        self, b: Lowering, states: Sequence[str], kept: Sequence[int], step: Step
    ) -> tuple[list[str], list[str]]:
        pieces = [self._pieces(b, value) for value in self.inputs]
        order = range(self.steps)
        parts: dict[int, Sequence[str]] = {}
        for t in reversed(order) if self.reverse else order:
            states, parts[t] = step(states, [piece[t] for piece in pieces])
        stacked = []
        for i, features in enumerate(kept):
            joined = b.op("Concat", *[parts[t][i] for t in order], axis=1)
            stacked.append(b.op("Reshape", joined, b.ints([features, self.steps, -1])))
        return list(states), stacked

    def _pieces(self, b: Lowering, value: Value) -> list[str]:
        flat = b.op("Reshape", value.name, b.ints([value.static(0)[0], -1]))
        if self.steps == 1:
            return [flat]
        return b.ops("Split", self.steps, flat, axis=1, num_outputs=self.steps)

    def _scan(
        self, b: Lowering, states: Sequence[tuple[str, int]], kept: Sequence[int], step: Step
    ) -> tuple[list[str], list[str]]:
        def ports(features: Sequence[int]) -> list[Port]:
            return [Port(b.name(), (size, None), "float32") for size in features]

        carried, scanned = ports([f for _, f in states]), ports([value.static(0)[0] for value in self.inputs])
        outer, b.graph.nodes = b.graph.nodes, []
        after, parts = step([p.name for p in carried], [p.name for p in scanned])
        # Each output of the body is a value of its own that a node of the body makes.
        made = [b.op("Identity", name) for name in (*after, *parts)]
        inner, b.graph.nodes = b.graph.nodes, outer
        shapes = [(f, None) for f in (*[f for _, f in states], *kept)]
        results = [Port(name, shape, "float32") for name, shape in zip(made, shapes, strict=True)]
        outputs = [b.name() for _ in results]
        attributes = {
            "num_scan_inputs": len(scanned),
            "scan_input_directions": [int(self.reverse)] * len(scanned),
            "scan_output_directions": [int(self.reverse)] * len(kept),
        }
        order = [1, 0, 2]
        inputs = [name for name, _ in states] + [b.transpose(value.name, order) for value in self.inputs]
        body = Branch(inner, results, [*carried, *scanned])
        b.graph.nodes.append(Node("Scan", inputs, outputs, attributes, {"body": body}))
        last, stacked = outputs[: len(states)], outputs[len(states) :]
        return last, [b.transpose(name, order) for name in stacked]


def _features(value: Value) -> int:
    return value.static(0)[0]


def _rnn(
    b: Lowering, out: Sequence[Value], x: Value, first: Value, weight: Value, activation: str, reverse: bool
) -> tuple[str, ...]:
    size = _features(first)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state = b.op(activation.capitalize(), b.op("Gemm", weight.name, states[0], inputs[0]))
        return [state], [state, states[0]]

    return tuple(Loop([x], reverse).run(b, [(first.name, size)], [size, size], step)[1])


def _rnn_backward(
    b: Lowering, out: Sequence[Value], grad: Value, slope: Value, weight: Value, reverse: bool
) -> tuple[str, ...]:
    size = _features(grad)
    turned = b.transpose(weight.name, [1, 0])

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        through = b.op("Mul", b.op("Add", states[0], inputs[0]), inputs[1])
        return [b.op("Gemm", turned, through)], [through]

    zero = b.zeros([size, grad.shape[2]], "float32")
    last, stacked = Loop([grad, slope], not reverse).run(b, [(zero, size)], [size], step)
    return stacked[0], last[0]


def _gru(
    b: Lowering,
    out: Sequence[Value],
    gates: Value,
    news: Value,
    first: Value,
    w_gates: Value,
    w_new: Value,
    bias: Value,
    reverse: bool,
) -> tuple[str, ...]:
    size = _features(first)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state = states[0]
        gate = b.op("Sigmoid", b.op("Gemm", w_gates.name, state, inputs[0]))
        reset, update = b.ops("Split", 2, gate, axis=0, num_outputs=2)
        inner = b.op("Gemm", w_new.name, state, bias.name)
        new = b.op("Tanh", b.op("Add", inputs[1], b.op("Mul", reset, inner)))
        after = b.op("Add", new, b.op("Mul", update, b.op("Sub", state, new)))
        return [after], [after, state, gate, new, inner]

    kept = [size, size, 2 * size, size, size]
    return tuple(Loop([gates, news], reverse).run(b, [(first.name, size)], kept, step)[1])


def _gru_backward(
    b: Lowering,
    out: Sequence[Value],
    grad: Value,
    to_new: Value,
    to_reset: Value,
    to_update: Value,
    reset: Value,
    update: Value,
    weight: Value,
    reverse: bool,
) -> tuple[str, ...]:
    size = _features(grad)
    turned = b.transpose(weight.name, [1, 0])

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        given, toward_new, toward_reset, toward_update, opened, kept = inputs
        total = b.op("Add", states[0], given)
        new = b.op("Mul", total, toward_new)
        parts = b.op("Mul", new, toward_reset), b.op("Mul", total, toward_update), b.op("Mul", new, opened)
        through = b.op("Concat", *parts, axis=0)
        return [b.op("Gemm", turned, through, b.op("Mul", total, kept))], [through, new]

    zero = b.zeros([size, grad.shape[2]], "float32")
    loop = Loop([grad, to_new, to_reset, to_update, reset, update], not reverse)
    last, stacked = loop.run(b, [(zero, size)], [3 * size, size], step)
    return (*stacked, last[0])


def _lstm(
    b: Lowering,
    out: Sequence[Value],
    gates: Value,
    news: Value,
    first: Value,
    cell: Value,
    w_gates: Value,
    w_new: Value,
    reverse: bool,
) -> tuple[str, ...]:
    size = _features(first)

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        state, old = states
        gate = b.op("Sigmoid", b.op("Gemm", w_gates.name, state, inputs[0]))
        new = b.op("Tanh", b.op("Gemm", w_new.name, state, inputs[1]))
        enter, forget, leave = b.ops("Split", 3, gate, axis=0, num_outputs=3)
        held = b.op("Add", b.op("Mul", forget, old), b.op("Mul", enter, new))
        curved = b.op("Tanh", held)
        after = b.op("Mul", leave, curved)
        return [after, held], [after, state, old, gate, new, curved]

    kept = [size, size, size, 3 * size, size, size]
    last, stacked = Loop([gates, news], reverse).run(b, [(first.name, size), (cell.name, size)], kept, step)
    return (*stacked, last[1])


def _lstm_backward(
    b: Lowering,
    out: Sequence[Value],
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
) -> tuple[str, ...]:
    size = _features(grad)
    turned = b.transpose(weight.name, [1, 0])

    def step(states: Sequence[str], inputs: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
        given, toward_cell, toward_input, toward_forget, toward_output, toward_new, kept = inputs
        total = b.op("Add", states[0], given)
        cell = b.op("Add", states[1], b.op("Mul", total, toward_cell))
        parts = [b.op("Mul", cell, toward) for toward in (toward_input, toward_forget)]
        parts += [b.op("Mul", total, toward_output), b.op("Mul", cell, toward_new)]
        through = b.op("Concat", *parts, axis=0)
        return [b.op("Gemm", turned, through), b.op("Mul", cell, kept)], [through]

    zero = b.zeros([size, grad.shape[2]], "float32")
    loop = Loop([grad, to_cell, to_input, to_forget, to_output, to_new, forget], not reverse)
    start = [(zero, size), (last.name if last is not None else zero, size)]
    ends, stacked = loop.run(b, start, [4 * size], step)
    return (stacked[0], *ends)


RECURRENT: dict[str, Rule] = {
    "fedge.rnn": _rnn,
    "fedge.rnn_backward": _rnn_backward,
    "fedge.gru": _gru,
    "fedge.gru_backward": _gru_backward,
    "fedge.lstm": _lstm,
    "fedge.lstm_backward": _lstm_backward,
}
