"""Activations and their gradients.

ONNX Runtime fuses almost nothing of a training graph, so each rule is written for few passes over memory: a gradient
is read off the activation's own result where that is possible (equal nodes are merged later), and selections are
products with a cast mask, which takes a fifth of the time of Where. At kinks the slopes are PyTorch's.
"""

import math

from export.attention import LOWEST
from export.lower import Lowering, Rule, Value

INVERSE_SQRT_TAU = 1 / math.sqrt(2 * math.pi)
SOFTPLUS_IS_LINEAR = 15.0
"""Above this, log(1 + exp(x)) and x are the same float32 number up to rounding."""


def _number(b: Lowering, value: float) -> str:
    return b.scalar(value, "float32")


def _mask(b: Lowering, kind: str, x: str, bound: float) -> str:
    """1.0 where ``x`` compares to ``bound``, else 0.0."""
    return b.cast(b.op(kind, x, _number(b, bound)), "bool", "float32")


def _threshold_backward(b: Lowering, out: Value, grad: Value, result: Value, threshold: float) -> str:
    if threshold == 0:
        # One pass instead of a comparison and a cast: what is above zero comes out as one.
        return b.op("Mul", grad.name, b.op("HardSigmoid", result.name, alpha=3e38, beta=0.0))
    return b.op("Mul", grad.name, _mask(b, "Greater", result.name, threshold))


def _hardtanh(b: Lowering, out: Value, x: Value, low: float = -1.0, high: float = 1.0) -> str:
    return b.op("Clip", x.name, _number(b, low), _number(b, high))


def _hardtanh_backward(b: Lowering, out: Value, grad: Value, x: Value, low: float, high: float) -> str:
    above, below = b.op("Greater", x.name, _number(b, low)), b.op("Less", x.name, _number(b, high))
    return b.op("Mul", grad.name, b.cast(b.op("And", above, below), "bool", "float32"))


def _leaky_relu_backward(b: Lowering, out: Value, grad: Value, x: Value, slope: float, _: bool) -> str:
    positive = _mask(b, "Greater", x.name, 0)
    factor = b.op("Add", b.op("Mul", positive, _number(b, 1 - slope)), _number(b, slope))
    return b.op("Mul", grad.name, factor)


def _prelu(b: Lowering, out: Value, x: Value, slope: Value) -> str:
    return b.op("PRelu", x.name, slope.name)


def _prelu_backward(b: Lowering, out: object, grad: Value, x: Value, slope: Value) -> tuple[str, str]:
    rest = b.op("Sub", _number(b, 1), slope.name)
    factor = b.op("Add", b.op("Mul", _mask(b, "Greater", x.name, 0), rest), slope.name)
    return b.op("Mul", grad.name, factor), b.op("Mul", grad.name, b.op("Min", x.name, _number(b, 0)))


def _elu(b: Lowering, out: Value, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    if input_scale == 1 and scale == 1:
        return b.op("Elu", x.name, alpha=float(alpha))
    if input_scale == 1:
        return b.op("Selu", x.name, alpha=float(alpha), gamma=float(scale))
    if scale == 1 and math.isclose(alpha * input_scale, 1):
        return b.op("Celu", x.name, alpha=float(alpha))
    curved = b.op("Elu", b.op("Mul", x.name, _number(b, input_scale)), alpha=float(alpha))
    # Elu also scaled the positive part.
    positive = b.op("Mul", b.op("Max", x.name, _number(b, 0)), _number(b, scale))
    return b.op("Add", positive, b.op("Mul", b.op("Min", curved, _number(b, 0)), _number(b, scale)))


def _elu_backward(
    b: Lowering, out: Value, grad: Value, alpha: float, scale: float, input_scale: float, is_result: bool, x: Value
) -> str:
    # Where x <= 0, the result y = scale alpha (exp(input_scale x) - 1) has the slope input_scale (y + scale alpha).
    at_zero = input_scale * scale * alpha
    y = x.name if is_result else _elu(b, out, x, alpha, scale, input_scale)
    slope = b.op("Min", y, _number(b, 0))
    if input_scale != 1:
        slope = b.op("Mul", slope, _number(b, input_scale))
    slope = b.op("Add", slope, _number(b, at_zero))
    if not math.isclose(at_zero, scale):
        slope = b.op("Add", slope, b.op("Mul", _mask(b, "Greater", y, 0), _number(b, scale - at_zero)))
    return b.op("Mul", grad.name, slope)


def _sigmoid_backward(b: Lowering, out: Value, grad: Value, y: Value) -> str:
    return b.op("Mul", grad.name, b.op("Mul", y.name, b.op("Sub", _number(b, 1), y.name)))


def _tanh_backward(b: Lowering, out: Value, grad: Value, y: Value) -> str:
    return b.op("Mul", grad.name, b.op("Sub", _number(b, 1), b.op("Mul", y.name, y.name)))


def _gelu(b: Lowering, out: Value, x: Value, *, approximate: str = "none") -> str:
    return b.op("Gelu", x.name, approximate=approximate)


def _gelu_backward(b: Lowering, out: Value, grad: Value, x: Value, *, approximate: str = "none") -> str:
    if approximate == "tanh":
        square = b.op("Mul", x.name, x.name)
        # 0.5 (1 + t) + 0.5 x (1 - t^2) u' with t = tanh(u), u = k (x + c x^3)
        k, c = math.sqrt(2 / math.pi), 0.044715
        inner = b.op("Mul", x.name, b.op("Add", b.op("Mul", square, _number(b, k * c)), _number(b, k)))
        t = b.op("Tanh", inner)
        steep = b.op("Mul", x.name, b.op("Add", b.op("Mul", square, _number(b, 1.5 * k * c)), _number(b, 0.5 * k)))
        half = b.op("Add", b.op("Mul", t, _number(b, 0.5)), _number(b, 0.5))
        slope = b.op("Add", half, b.op("Mul", steep, b.op("Sub", _number(b, 1), b.op("Mul", t, t))))
        return b.op("Mul", grad.name, slope)
    # Phi(x) + x phi(x): HardSigmoid is the straight line through erf, the quotient saves the exponent's sign.
    root = b.op("Mul", x.name, _number(b, math.sqrt(0.5)))
    cdf = b.op("HardSigmoid", b.op("Erf", root), alpha=0.5, beta=0.5)
    bell = b.op("Div", x.name, b.op("Exp", b.op("Mul", root, root)))
    slope = b.op("Add", cdf, b.op("Mul", bell, _number(b, INVERSE_SQRT_TAU)))
    return b.op("Mul", grad.name, slope)


def _silu(b: Lowering, out: Value, x: Value) -> str:
    return b.op("Mul", x.name, b.op("Sigmoid", x.name))


def _silu_backward(b: Lowering, out: Value, grad: Value, x: Value) -> str:
    s = b.op("Sigmoid", x.name)
    slope = b.op("Add", s, b.op("Mul", _silu(b, out, x), b.op("Sub", _number(b, 1), s)))
    return b.op("Mul", grad.name, slope)


def _mish(b: Lowering, out: Value, x: Value) -> str:
    return b.op("Mul", x.name, b.op("Tanh", b.op("Softplus", x.name)))


def _mish_backward(b: Lowering, out: Value, grad: Value, x: Value) -> str:
    t = b.op("Tanh", b.op("Softplus", x.name))
    curved = b.op("Mul", _silu(b, out, x), b.op("Sub", _number(b, 1), b.op("Mul", t, t)))
    return b.op("Mul", grad.name, b.op("Add", t, curved))


def _hardsigmoid(b: Lowering, out: Value, x: Value) -> str:
    return b.op("HardSigmoid", x.name, alpha=1 / 6, beta=0.5)


def _inside(b: Lowering, x: Value) -> str:
    return _mask(b, "Less", b.op("Abs", x.name), 3)


def _hardsigmoid_backward(b: Lowering, out: Value, grad: Value, x: Value) -> str:
    return b.op("Mul", b.op("Mul", grad.name, _inside(b, x)), _number(b, 1 / 6))


def _hardswish(b: Lowering, out: Value, x: Value) -> str:
    return b.op("Mul", x.name, _hardsigmoid(b, out, x))


def _hardswish_backward(b: Lowering, out: Value, grad: Value, x: Value) -> str:
    ramp = b.op("Mul", b.op("Mul", x.name, _inside(b, x)), _number(b, 1 / 6))
    return b.op("Mul", grad.name, b.op("Add", _hardsigmoid(b, out, x), ramp))


def _softplus(b: Lowering, out: Value, x: Value, beta: float = 1, threshold: float = 20) -> str:
    scaled = b.op("Mul", x.name, _number(b, beta)) if beta != 1 else x.name
    y = b.op("Softplus", scaled)
    if beta != 1:
        y = b.op("Div", y, _number(b, beta))
    if threshold >= SOFTPLUS_IS_LINEAR:
        return y
    return b.op("Where", b.op("Greater", scaled, _number(b, threshold)), x.name, y)


def _softplus_backward(b: Lowering, out: Value, grad: Value, x: Value, beta: float, threshold: float) -> str:
    scaled = b.op("Mul", x.name, _number(b, beta)) if beta != 1 else x.name
    slope = b.op("Sigmoid", scaled)
    if threshold < SOFTPLUS_IS_LINEAR:
        slope = b.op("Max", slope, _mask(b, "Greater", scaled, threshold))
    return b.op("Mul", grad.name, slope)


def _log_sigmoid(b: Lowering, out: object, x: Value) -> tuple[str, None]:
    return b.op("Neg", b.op("Softplus", b.op("Neg", x.name))), None


def _log_sigmoid_backward(b: Lowering, out: Value, grad: Value, x: Value, _: object) -> str:
    return b.op("Mul", grad.name, b.op("Sigmoid", b.op("Neg", x.name)))


def _softmax(b: Lowering, out: Value, x: Value, dim: int, _: object) -> str:
    scores = x.name
    if _masked(b, scores):
        largest = b.reduce("ReduceMax", scores, [dim], True)
        scores = b.op("Max", scores, b.op("Add", largest, _number(b, LOWEST)))
    return b.op("Softmax", scores, axis=dim)


HIDDEN = -1e4
"""Where a constant this low is put into scores, it is there to mask them."""


def _masked(b: Lowering, name: str) -> bool:
    source = next((node for node in reversed(b.graph.nodes) if name in node.outputs), None)
    if source is None or source.op not in ("Where", "Reshape"):
        return False
    if source.op == "Reshape":
        return _masked(b, source.inputs[0])
    constants = [b.graph.constants[value] for value in source.inputs[1:] if value in b.graph.constants]
    return any(value.size == 1 and value.item() <= HIDDEN for value in constants)


def _softmax_backward(b: Lowering, out: Value, grad: Value, y: Value, dim: int, _: object) -> str:
    total = b.reduce("ReduceSum", b.op("Mul", grad.name, y.name), [dim], True)
    return b.op("Mul", y.name, b.op("Sub", grad.name, total))


ACTIVATIONS: dict[str, Rule] = {
    "aten.threshold_backward": _threshold_backward,
    "aten.hardtanh": _hardtanh,
    "aten.hardtanh_backward": _hardtanh_backward,
    "aten.leaky_relu": lambda b, out, x, slope=0.01: b.op("LeakyRelu", x.name, alpha=float(slope)),
    "aten.leaky_relu_backward": _leaky_relu_backward,
    "aten._prelu_kernel": _prelu,
    "aten._prelu_kernel_backward": _prelu_backward,
    "aten.elu": _elu,
    "aten.elu_backward": _elu_backward,
    "aten.sigmoid_backward": _sigmoid_backward,
    "aten.tanh_backward": _tanh_backward,
    "aten.gelu": _gelu,
    "aten.gelu_backward": _gelu_backward,
    "aten.silu": _silu,
    "aten.silu_backward": _silu_backward,
    "aten.mish": _mish,
    "aten.mish_backward": _mish_backward,
    "aten.hardsigmoid": _hardsigmoid,
    "aten.hardsigmoid_backward": _hardsigmoid_backward,
    "aten.hardswish": _hardswish,
    "aten.hardswish_backward": _hardswish_backward,
    "aten.softplus": _softplus,
    "aten.softplus_backward": _softplus_backward,
    "aten.log_sigmoid_forward": _log_sigmoid,
    "aten.log_sigmoid_backward": _log_sigmoid_backward,
    "aten._softmax": _softmax,
    "aten._softmax_backward_data": _softmax_backward,
    "aten._log_softmax": lambda b, out, x, dim, _: b.op("LogSoftmax", x.name, axis=dim),
}
