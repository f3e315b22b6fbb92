"""Dropout whose masks are a hash of a counter: fresh each step, reproducible, the same in PyTorch and in ONNX Runtime.

ONNX draws random numbers from seeds that a graph fixes, and no two libraries draw alike. Here, element ``j`` of row
``r`` in call ``c`` of step ``t`` is kept when a 32-bit hash of ``(seed, t, c, r, j)`` is below ``(1 - p) 2^32``:
counter-based, as in Salmon et al. 2011 (doi 10.1145/2063384.2063405), and thus independent of threads and batch size.

Rows and columns are hashed on their own (Wellons' 32-bit finalizer), so that the elements take one Xor and one Mul,
which are among the fastest operators: ``(a_r ^ b_j) * c_r`` with an odd factor ``c_r`` for each row.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError
from export.attention import bound, multi_head, scaled_dot_product
from export.lower import Lowering, Rule, Size, Value

Words = npt.NDArray[np.uint32]

ROW_FACTOR = 0x9E3779B1
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B))
_LAST_SHIFT = 16
_SEED_FACTOR, _STEP_FACTOR = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_KEY_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_KEY_LAST_SHIFT = 31

SELU_FLOOR = -1.7580993408473766
"""What SELU tends to; alpha dropout (Klambauer et al. 2017, arXiv 1706.02515) puts it where it drops."""


def rows_and_columns(shape: Sequence[Size]) -> tuple[Size, Size]:
    """How a shape splits into hashed rows and columns: the first two dimensions are rows, but the last one never is."""
    leading = max(min(2, len(shape) - 1), min(1, len(shape)))
    return math.prod(shape[:leading]), math.prod(shape[leading:])


def threshold(p: float) -> int:
    """Hashes below it are kept."""
    return min(round((1 - p) * 2**32), 2**32 - 1)


def call_words(call: int) -> tuple[int, int]:
    """Two words that tell one dropout call of a forward pass from the others."""
    first, second = mixed(np.array([2 * call + 1, 2 * call + 2], np.uint32))
    return int(first), int(second)


def mixed(words: Words) -> Words:
    """A bijective hash of 32-bit words."""
    for shift, factor in _ROUNDS:
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return words ^ (words >> np.uint32(_LAST_SHIFT))


def keys(seed: int, step: int) -> tuple[int, int]:
    """Two words that a whole step shares, from seed and step (any int64)."""
    word = np.array([seed], np.int64).astype(np.uint64) * np.uint64(_SEED_FACTOR)
    word = word + np.array([step], np.int64).astype(np.uint64) * np.uint64(_STEP_FACTOR)
    for shift, factor in _KEY_ROUNDS:
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    word = word ^ (word >> np.uint64(_KEY_LAST_SHIFT))
    return int(word[0] & np.uint64(0xFFFFFFFF)), int(word[0] >> np.uint64(32))


@torch.library.custom_op("fedge::keep", mutates_args=())
def keep(shape: Sequence[int], seed: Tensor, step: Tensor, call: int, p: float, scale: float) -> Tensor:
    """The mask of one dropout call: ``scale`` with probability ``1 - p``, else 0.

    ``shape`` float32; ``seed`` and ``step`` are int64 scalars, ``call`` counts the calls of one forward pass.
    """
    rows, columns = (int(size) for size in rows_and_columns(shape))
    first, second = (key ^ word for key, word in zip(keys(int(seed), int(step)), call_words(call), strict=True))
    row = mixed(np.arange(rows, dtype=np.uint32)) ^ np.uint32(first)
    column = mixed(np.arange(columns, dtype=np.uint32)) ^ np.uint32(second)
    factor = (row * np.uint32(ROW_FACTOR)) | np.uint32(1)
    hashed = (row[:, None] ^ column[None]) * factor[:, None]
    mask = (hashed < np.uint32(threshold(p))).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(mask.reshape(tuple(shape)))


@keep.register_fake
def _(shape: Sequence[int], seed: Tensor, step: Tensor, call: int, p: float, scale: float) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _word(b: Lowering, value: int, dtype: str = "uint32") -> str:
    return b.constant(np.array(value, dtype))


def _finalized(b: Lowering, name: str, rounds: Sequence[tuple[int, int]], last: int, dtype: str) -> str:
    for shift, factor in rounds:
        shifted = b.op("BitShift", name, _word(b, shift, dtype), direction="RIGHT")
        name = b.op("Mul", b.op("BitwiseXor", name, shifted), _word(b, factor, dtype))
    return b.op("BitwiseXor", name, b.op("BitShift", name, _word(b, last, dtype), direction="RIGHT"))


def _counted(b: Lowering, size: Size, shape: Sequence[int]) -> str:
    count = b.op("Squeeze", b.size(size)) if not isinstance(size, int) else b.scalar(size, "int64")
    numbers = b.op("Range", b.scalar(0, "int64"), count, b.scalar(1, "int64"))
    words = b.cast(b.op("Reshape", numbers, b.ints(shape)), "int64", "uint32")
    return _finalized(b, words, _ROUNDS, _LAST_SHIFT, "uint32")


def _keep(
    b: Lowering, out: Value, shape: Sequence[Size], seed: Value, step: Value, call: int, p: float, scale: float
) -> str:
    weighted = b.op("Mul", b.cast(seed.name, "int64", "uint64"), _word(b, _SEED_FACTOR, "uint64"))
    stepped = b.op("Mul", b.cast(step.name, "int64", "uint64"), _word(b, _STEP_FACTOR, "uint64"))
    key = _finalized(b, b.op("Add", weighted, stepped), _KEY_ROUNDS, _KEY_LAST_SHIFT, "uint64")
    # The mask comes first: what a cast makes of a number that does not fit is nowhere written down.
    low = b.cast(b.op("BitwiseAnd", key, _word(b, 0xFFFFFFFF, "uint64")), "uint64", "uint32")
    high = b.cast(b.op("BitShift", key, _word(b, 32, "uint64"), direction="RIGHT"), "uint64", "uint32")
    first, second = (
        b.op("BitwiseXor", half, _word(b, word)) for half, word in zip((low, high), call_words(call), strict=True)
    )
    rows, columns = rows_and_columns(out.shape)
    row = b.op("BitwiseXor", _counted(b, rows, [-1, 1]), first)
    column = b.op("BitwiseXor", _counted(b, columns, [1, -1]), second)
    factor = b.op("BitwiseOr", b.op("Mul", row, _word(b, ROW_FACTOR)), _word(b, 1))
    hashed = b.op("Mul", b.op("BitwiseXor", row, column), factor)
    kept = b.cast(b.op("Less", hashed, _word(b, threshold(p))), "bool", "float32")
    return b.reshape(b.op("Mul", kept, b.scalar(scale, "float32")) if scale != 1 else kept, out.shape)


DROPOUT: dict[str, Rule] = {"fedge.keep": _keep}


class DropoutMode(TorchFunctionMode):
    """While active, every dropout of PyTorch takes its mask from ``(seed, step, number of the call)``.

    Enter a new one for each forward pass, on top of other modes; inside a step that is traced and around the PyTorch
    reference alike, which then draw the same masks. Nothing changes where a module is in evaluation mode or p is 0.

    Args:
        seed: int64 scalar, one for a task.
        step: int64 scalar: 1, 2, 3, ... within the task.
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()
        self._seed, self._step = seed, step
        self._calls = 0

    @property
    def calls(self) -> int:
        """How many masks were drawn: with none, the step needs neither seed nor step."""
        return self._calls

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the functions that drop something, pass all others on."""
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        kind = name.rstrip("_")
        if kind in _FUNCTIONS:
            return self._dropout(kind, name.endswith("_"), *args, **named)
        if name in _RECURRENT and len(args) == 9 and args[5] > 0 and args[6]:
            return self._between_layers(func, *args)
        if name == "scaled_dot_product_attention" and _attention_drops(args, named):
            return scaled_dot_product(self.drop, *args, **named)
        if name == "multi_head_attention_forward":
            given = bound(args, named)
            if given["training"] and given["dropout_p"] > 0:
                return multi_head(self.drop, given)
        return func(*args, **named)

    def drop(self, x: Tensor, p: float) -> Tensor:
        """``x`` with each element dropped with probability ``p``, the others scaled to keep the mean."""
        return x * self._mask(x.shape, p, _scale(p))

    def _mask(self, shape: Sequence[int], p: float, scale: float) -> Tensor:
        if not 0 <= p <= 1:
            raise ExportError(f"dropout has p={p:g}; expected a probability between 0 and 1")
        self._calls += 1
        mask: Tensor = keep(list(shape), self._seed, self._step, self._calls, p, scale)
        return mask

    def _dropout(
        self,
        kind: str,
        in_place: bool,
        input: Tensor,  # noqa: A002 - PyTorch's name, which callers may use
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        train: bool = True,
    ) -> Tensor:
        if not (training and train) or p == 0:
            return input
        shape = list(input.shape)
        if kind in _FEATURES:
            channel = 2 if input.dim() > _FEATURES[kind] else 1
            shape[channel:] = [1] * (input.dim() - channel)
        if "alpha" not in kind:
            mask = self._mask(shape, p, _scale(p))
            return input.mul_(mask) if in_place or inplace else input * mask
        # Mean and variance stay what they were, of inputs with mean 0 and variance 1.
        scale = 1 / math.sqrt((1 - p) * (1 + p * SELU_FLOOR**2)) if p < 1 else 0.0
        mask = self._mask(shape, p, scale)
        shift = (scale - mask) * SELU_FLOOR - scale * p * SELU_FLOOR
        result = input * mask + shift
        return input.copy_(result) if in_place or inplace else result

    def _between_layers(
        self,
        func: Callable[..., Any],
        x: Tensor,
        start: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: bool,
        layers: int,
        p: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        """A recurrent network one layer at a time."""
        directions = 2 if bidirectional else 1
        width = len(weights) // layers
        lasts: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            if layer:
                x = self.drop(x, p)
            place = slice(directions * layer, directions * (layer + 1))
            first = start[place] if isinstance(start, Tensor) else tuple(s[place] for s in start)
            own = list(weights[width * layer : width * (layer + 1)])
            x, *last = func(x, first, own, biases, 1, 0.0, training, bidirectional, batch_first)
            lasts.append(tuple(last))
        return (x, *(torch.cat(parts) for parts in zip(*lasts, strict=True)))


def _attention_drops(args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    p: float = args[4] if len(args) > 4 else named.get("dropout_p", 0.0)
    return p > 0


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# Dropped by whole channels, with the number of dimensions that an example without a batch has.
_FEATURES = {"dropout1d": 2, "dropout2d": 2, "dropout3d": 4, "feature_dropout": 1, "feature_alpha_dropout": 1}
_FUNCTIONS = ("dropout", "alpha_dropout", *_FEATURES)
