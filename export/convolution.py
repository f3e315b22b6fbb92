"""Convolution, plain and transposed, and its gradients: rules that hand each layer to the formulation chosen for it.

A transposed convolution is the gradient of a plain one toward its input, so one set of formulations serves both.
"""

from collections.abc import Sequence

from export.formulation import Formulation, Layer
from export.lower import Lowering, Rule, Value
from export.operators import convolution


def _forward(
    b: Lowering,
    out: Value,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    found = _formulation(
        b, out if transposed else x, x if transposed else out, weight, stride, padding, dilation, groups
    )
    constant = not b.differentiated or weight.name in b.constants
    if constant and not any(o >= s for o, s in zip(output_padding, stride, strict=True)):
        # Constant weights, as all are without a backward pass, are what the runtime's own convolution wants.
        return convolution(b, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    result = (found.toward_input if transposed else found.convolve)(b, x.name, weight.name)
    if bias is None:
        return result
    return b.op("Add", result, b.op("Reshape", bias.name, b.ints([-1, *[1] * (x.rank - 2)])))


def _backward(
    b: Lowering,
    out: Sequence[Value],
    grad: Value,
    x: Value,
    weight: Value,
    bias: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    mask: Sequence[bool],
) -> tuple[str | None, ...]:
    whole, part = (grad, x) if transposed else (x, grad)
    found = _formulation(b, whole, part, weight, stride, padding, dilation, groups)
    toward_input = found.convolve if transposed else found.toward_input
    return (
        toward_input(b, grad.name, weight.name) if mask[0] else None,
        found.toward_weight(b, part.name, whole.name) if mask[1] else None,
        b.reduce("ReduceSum", grad.name, [0, *range(2, grad.rank)]) if mask[2] else None,
    )


def _formulation(
    b: Lowering,
    x: Value,
    out: Value,
    weight: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Formulation:
    """The formulation of the plain convolution ``x`` -> ``out``."""
    spatial = range(2, x.rank)
    layer = Layer(
        inputs=x.static(1)[0],
        outputs=out.static(1)[0],
        sizes=x.static(*spatial),
        results=out.static(*spatial),
        kernel=weight.static(*spatial),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
    )
    found: Formulation = b.choose(layer)
    return found


CONVOLUTION: dict[str, Rule] = {"aten.convolution": _forward, "aten.convolution_backward": _backward}
