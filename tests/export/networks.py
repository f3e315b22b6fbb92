"""Small random networks of covered layers, drawn by Hypothesis; a recipe's repr says all that makes one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

MOST_VALUES = 3000
"""Of one example anywhere in a network."""


@dataclass(frozen=True)
class Layer:
    """A class of `torch.nn` or of this module, and what it is made with; ``parts`` are layers inside."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: "tuple[tuple[Layer, ...], ...]" = ()

    def make(self) -> nn.Module:
        """The module."""
        known: Any = globals().get(self.kind) or getattr(nn, self.kind)
        made: nn.Module = known(*(build(part) for part in self.parts), **self.options)
        return made


def build(layers: tuple[Layer, ...]) -> nn.Module:
    """The layers one after another."""
    return nn.Sequential(*(layer.make() for layer in layers))


class Sum(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Concatenation(nn.Module):
    """Both bodies' results, one after the other along the channels (first axis behind the batch)."""

    def __init__(self, first: nn.Module, second: nn.Module, dim: int) -> None:
        super().__init__()
        self.first, self.second, self.dim = first, second, dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], self.dim)


class Tied(nn.Module):
    """A layer and its transpose, of one weight."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=False)
        self.up.weight = nn.Parameter(self.up.weight.detach())
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.down(x)), self.down.weight.t(), self.bias) + self.up(self.down(x))


class Axes(nn.Module):
    """The axes behind the batch in another order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *self.order)


class States(nn.Module):
    """What a recurrent layer gives at each step."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


class Attention(nn.Module):
    """Self-attention, that of each step to those before it where ``causal``."""

    def __init__(self, features: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.layer, self.causal = nn.MultiheadAttention(features, heads, batch_first=True), causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        result: Tensor = self.layer(x, x, x, attn_mask=mask, need_weights=False)[0]
        return result


class Reduced(nn.Module):
    """The last step of a sequence, the first, or the mean. (A maximum has ties up to rounding.)"""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return {
            "last": lambda: x[:, -1],
            "first": lambda: x[:, 0],
            "mean": lambda: x.mean(1),
            "max": lambda: x.amax(1),
        }[self.how]()


@dataclass(frozen=True)
class Recipe:
    """A network with its input (``kind`` and shape of one example), loss, optimizer and what of it trains."""

    kind: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    loss: str
    loss_options: dict[str, Any]
    training: dict[str, Any]
    batch: int
    tokens: int = 11

    def make(self) -> nn.Module:
        """The network, of weights that depend on nothing but the recipe."""
        torch.manual_seed(0)
        return build(self.layers)


def sizes(layers: tuple[Layer, ...], kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Of one example's result; None where the layers do not take such an input, or it grows too large."""
    x = torch.zeros((2, *shape), dtype=torch.int64 if kind == "tokens" else torch.float32)
    try:
        with torch.no_grad():
            result = build(layers).eval()(x).shape[1:]
    except (RuntimeError, ValueError, AssertionError):
        return None
    return tuple(result) if 0 < result.numel() <= MOST_VALUES else None


ACTIVATIONS = (
    "ReLU", "LeakyReLU", "ReLU6", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus",
    "Softsign",    "Hardswish", "Hardsigmoid", "Hardtanh", "LogSigmoid", "Tanhshrink", "Softshrink",
    "Hardshrink", "PReLU",
)  # fmt: skip
DIMENSIONS = {"signal": 1, "image": 2, "volume": 3}
few = st.integers(1, 3)


@st.composite
def activations(draw: st.DrawFn) -> Layer:
    """One of them, or dropout."""
    name = draw(st.sampled_from((*ACTIVATIONS, "Dropout")))
    return Layer(name, {"p": draw(st.sampled_from((0.1, 0.5)))} if name == "Dropout" else {})


@st.composite
def convolutions(draw: st.DrawFn, n: int, channels: int, *, same: bool = False) -> Layer:
    """Of any geometry; ``same`` keeps channels and sizes."""
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, channels) if channels % g == 0]))
    outputs = channels if same else groups * draw(few)
    if same or draw(st.integers(0, 3)) != 0:
        kernel = draw(st.sampled_from((1, 3))) if same else tuple(draw(few) for _ in range(n))
        dilation = draw(st.integers(1, 2))
        padding: Any = dilation * (kernel // 2) if same else tuple(draw(st.integers(0, 2)) for _ in range(n))
        options = {
            "stride": 1 if same else tuple(draw(st.integers(1, 2)) for _ in range(n)), "padding": padding,
            "dilation": dilation, "padding_mode": draw(st.sampled_from(("zeros", "zeros", "zeros", "circular"))),
        }  # fmt: skip
        kind = f"Conv{n}d"
    else:
        kernel = tuple(draw(few) for _ in range(n))
        stride = draw(st.integers(1, 2))
        options = {
            "stride": stride, "padding": draw(st.integers(0, 1)), "output_padding": draw(st.integers(0, stride - 1)),
            "dilation": draw(st.integers(1, 2)),
        }  # fmt: skip
        kind = f"ConvTranspose{n}d"
    given = {"in_channels": channels, "out_channels": outputs, "kernel_size": kernel, "groups": groups}
    return Layer(kind, given | options | {"bias": draw(st.booleans())})


@st.composite
def poolings(draw: st.DrawFn, n: int) -> Layer:
    """Pooling and upsampling."""
    kind = draw(st.sampled_from(("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool", "Upsample")))
    if kind.startswith("Adaptive"):
        return Layer(f"{kind}{n}d", {"output_size": draw(few)})
    if kind == "Upsample":
        mode = draw(st.sampled_from(("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[n])))
        options = {} if mode == "nearest" else {"align_corners": draw(st.booleans())}
        return Layer(kind, {"scale_factor": draw(st.sampled_from((2, 3, 1.5))), "mode": mode} | options)
    kernel, ceil = draw(st.integers(1, 3)), draw(st.booleans())
    options = {"kernel_size": kernel, "stride": draw(few), "ceil_mode": ceil}
    if kind == "LPPool":
        return Layer(f"{kind}{n}d", options | {"norm_type": 2.0})
    options |= {"padding": draw(st.integers(0, kernel // 2))}
    return Layer(f"{kind}{n}d", options | ({"count_include_pad": draw(st.booleans())} if kind == "AvgPool" else {}))


@st.composite
def spatial(draw: st.DrawFn, kind: str, shape: tuple[int, ...]) -> Layer:
    """A layer for channels with 1 to 3 axes."""
    n, channels = DIMENSIONS[kind], shape[0]
    family = draw(
        st.sampled_from(("conv", "conv", "conv", "pool", "norm", "act", "residual", "concatenation", "other"))
    )
    if family == "conv":
        return draw(convolutions(n, channels))
    if family == "pool":
        return draw(poolings(n))
    if family == "act":
        return draw(activations())
    if family == "residual":
        return Layer("Sum", parts=((draw(convolutions(n, channels, same=True)), draw(activations())),))
    if family == "concatenation":
        parts = tuple((draw(convolutions(n, channels, same=True)),) for _ in range(2))
        return Layer("Concatenation", {"dim": 1}, parts)
    if family == "norm":
        affine = draw(st.booleans())
        return draw(
            st.sampled_from((
                Layer(f"BatchNorm{n}d", {"num_features": channels, "affine": affine}),
                Layer(f"BatchNorm{n}d", {"num_features": channels, "momentum": None}),
                # Without a scale: where that is frozen and axes are permuted later, PyTorch 2.13 errs on the shift.
                    Layer(f"InstanceNorm{n}d", {"num_features": channels}),
                Layer("GroupNorm", {"num_groups": 1, "num_channels": channels}),
                Layer("LayerNorm", {"normalized_shape": shape[-1], "elementwise_affine": affine}),
                Layer("LocalResponseNorm", {"size": 2}),
            ))
        )  # fmt: skip
    pads = draw(st.lists(st.integers(0, 1), min_size=2 * n, max_size=2 * n).map(tuple))
    padding = draw(st.sampled_from(("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad")))
    return draw(
        st.sampled_from((
            Layer(f"{padding}{n}d", {"padding": pads}),
            Layer(f"Dropout{n}d", {"p": 0.3}),
            Layer("ChannelShuffle", {"groups": 2}) if n == 2 else Layer("Identity"),
            Layer("PixelShuffle", {"upscale_factor": 2}) if n == 2 else Layer("Identity"),
            Layer("Softmax", {"dim": draw(st.integers(1, n))}),
            Layer("PReLU", {"num_parameters": channels}),
        ))
    )  # fmt: skip


@st.composite
def sequential(draw: st.DrawFn, features: int) -> Layer:
    """A layer for ``[steps, features]``."""
    hidden, flag = draw(st.integers(1, 6)), draw(st.booleans())
    heads = draw(st.sampled_from([h for h in (1, 2, 3) if features % h == 0]))
    recurrent = {"kind": draw(st.sampled_from(("RNN", "GRU", "LSTM"))), "input_size": features, "hidden_size": hidden}
    layers = draw(st.integers(1, 2))
    encoder = {
        "d_model": features, "nhead": heads, "dim_feedforward": 2 * hidden, "dropout": 0.2 * draw(few) - 0.2,
        "activation": draw(st.sampled_from(("relu", "gelu"))), "batch_first": True, "norm_first": flag,
    }  # fmt: skip
    return draw(
        st.sampled_from((
            Layer("States", recurrent | {"bidirectional": flag, "num_layers": layers, "dropout": 0.2 * (layers - 1)}),
            Layer("States", recurrent | {"bias": flag}),
            Layer("TransformerEncoderLayer", encoder),
            Layer("Sum", parts=((Layer("Attention", {"features": features, "heads": heads, "causal": flag}),),)),
            Layer("LayerNorm", {"normalized_shape": features}),
            Layer("RMSNorm", {"normalized_shape": features}),
            Layer("Linear", {"in_features": features, "out_features": hidden, "bias": flag}),
            Layer("Tied", {"features": features, "hidden": hidden}),
            draw(activations()),
        ))
    )  # fmt: skip


@st.composite
def flat(draw: st.DrawFn, features: int) -> Layer:
    """A layer for ``[features]``."""
    hidden, flag = draw(st.integers(1, 8)), draw(st.booleans())
    linear = Layer("Linear", {"in_features": features, "out_features": hidden, "bias": flag})
    square = Layer("Linear", {"in_features": features, "out_features": features})
    return draw(
        st.sampled_from((
            linear, linear, draw(activations()), draw(activations()),
            Layer("BatchNorm1d", {"num_features": features, "affine": flag}),
            Layer("LayerNorm", {"normalized_shape": features, "bias": flag}),
            Layer("RMSNorm", {"normalized_shape": features}),
            Layer("Tied", {"features": features, "hidden": hidden}),
            Layer("Sum", parts=((square, draw(activations())),)),
            Layer("Concatenation", {"dim": 1}, ((linear,), (square,))),
            Layer("AlphaDropout", {"p": 0.2}),
            Layer("Softmax", {"dim": 1}),
        ))
    )  # fmt: skip


@st.composite
def bridges(draw: st.DrawFn, kind: str, shape: tuple[int, ...]) -> tuple[str, tuple[Layer, ...]]:
    """From one kind of value to another: the new kind, and the layers."""
    if kind in ("signal", "sequence") and draw(st.booleans()):
        return ("sequence" if kind == "signal" else "signal"), (Layer("Axes", {"order": (2, 1)}),)
    if kind == "image" and draw(st.booleans()):
        return "sequence", (Layer("Flatten", {"start_dim": 2}), Layer("Axes", {"order": (2, 1)}))
    if kind == "sequence":
        return "vector", (Layer("Reduced", {"how": draw(st.sampled_from(("last", "first", "mean")))}),)
    if kind == "vector":
        return "signal", (Layer("Unflatten", {"dim": 1, "unflattened_size": (1, shape[0])}),)
    return "vector", (Layer("Flatten"),)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Two to six layers that fit one another, a head, a loss, an optimizer."""
    kind = draw(st.sampled_from(("image", "image", "signal", "volume", "sequence", "tokens", "vector")))
    rank = {"image": 3, "signal": 2, "volume": 4, "sequence": 2, "tokens": 1, "vector": 1}[kind]
    shape = tuple(draw(st.lists(st.integers(2, 5 if kind == "volume" else 8), min_size=rank, max_size=rank)))
    begin, layers = kind, ()
    state: tuple[str, tuple[int, ...]] = (kind, shape)
    if kind == "tokens":
        padding = draw(st.sampled_from((None, 0, 3)))
        layers = (
            Layer(
                "Embedding", {"num_embeddings": 11, "embedding_dim": draw(st.integers(2, 6)), "padding_idx": padding}
            ),
        )
        state = ("sequence", (*shape, layers[0].options["embedding_dim"]))
    wanted = draw(st.integers(2, 6))
    for _ in range(wanted):
        now, size = state
        if draw(st.integers(0, 4)) == 0:
            then, more = draw(bridges(now, size))
        else:
            then = now
            layer = {"sequence": sequential(size[-1]), "vector": flat(size[0])}.get(now)
            more = (draw(spatial(now, size) if layer is None else layer),)
        found = sizes((*layers, *more), begin, shape)
        if found is not None:
            layers, state = (*layers, *more), (then, found)
    loss, options = draw(
        st.sampled_from((
            ("cross_entropy", {}), ("cross_entropy", {"label_smoothing": 0.1}), ("nll", {}), ("mse", {}), ("l1", {}),
            ("huber", {"delta": 0.5}), ("bce_with_logits", {}),
        ))
    )  # fmt: skip
    layers = (*layers, *_head(draw, state, loss))
    owners = dict.fromkeys(name.split(".")[0] for name, _ in build(layers).named_parameters())
    # A pattern that matches everything, or nothing, is refused.
    first = next(iter(owners)) if len(owners) > 1 else None
    return Recipe(
        begin, shape, layers, loss, options, draw(trainings(first)),
        draw(st.sampled_from((2, 3, 5, 9))),
    )  # fmt: skip


def _head(draw: st.DrawFn, state: tuple[str, tuple[int, ...]], loss: str) -> tuple[Layer, ...]:
    kind, shape = state
    many = 1
    layers: tuple[Layer, ...] = ()
    if kind not in ("vector", "sequence"):
        for size in shape:
            many *= size
        layers = (Layer("Flatten"),)
    else:
        many = shape[-1]
    layers += (Layer("Linear", {"in_features": many, "out_features": draw(st.integers(2, 5))}),)
    return layers + ((Layer("LogSoftmax", {"dim": -1}),) if loss == "nll" else ())


@st.composite
def trainings(draw: st.DrawFn, first: str | None) -> dict[str, Any]:
    """Arguments of `export_bundle`; ``first`` is a layer that may be frozen."""
    optimizer = draw(st.sampled_from(("sgd", "momentum", "nesterov", "adam", "adamw")))
    parts: dict[str, Any] = draw(
        st.sampled_from(({}, {}, {}, {"train_only": "bias"}, {"last": 1}, {"freeze": (f"{first}.*",)} if first else {}))
    )
    return parts | {
        "optimizer": optimizer, "lr": 0.01 if optimizer.startswith("adam") else 0.05, "eps": 1e-2,
        "clip": draw(st.sampled_from((None, None, 0.5))), "weight_decay": draw(st.sampled_from((0.0, 0.02))),
        "proximal": draw(st.booleans()), "control": draw(st.booleans()),
    }  # fmt: skip
