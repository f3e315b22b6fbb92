"""The table of example vectors that the codec's tests share, and blocks small enough for them to have several."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from edge_client.codec.blocks import blocks
from edge_client.codec.layout import Layout, TensorSpec, Vector
from edge_client.codec.quantize import LEVEL_LIMIT, Quantized, quantize
from edge_client.codec.vector import VectorEncoder
from edge_client.codec.versions import CodedState

CONV = Layout(
    (
        TensorSpec("conv.weight", (16, 4, 5, 5)),
        TensorSpec("conv.bias", (16,)),
        TensorSpec("fc.weight", (64, 256)),
        TensorSpec("fc.bias", (64,)),
        TensorSpec("scale", ()),
    )
)
# A tensor of more than a small block, one with rows of more than a small block, and many that fit one together.
PLANTED = Layout(
    (
        TensorSpec("wide", (60, 150)),
        TensorSpec("rows", (2, 3500)),
        *(TensorSpec(f"lora{i}", (4, 50) if i % 2 else (50, 4)) for i in range(10)),
        TensorSpec("square", (40, 40)),
    )
)
LOGISTIC = Layout((TensorSpec("weight", (10, 784)), TensorSpec("bias", (10,))))


@dataclass(frozen=True)
class Example:
    name: str
    layout: Layout
    vector: Vector


def coarse(vector: Vector, multiple: float, dead_zone: float = 0.7) -> Quantized:
    """Quantized at a step in root mean squares, or the largest at which something is told."""
    wide = vector.astype(np.float64)
    highest = float(np.abs(wide).max())
    step = min(max(multiple * float(np.sqrt((wide**2).mean())), highest / LEVEL_LIMIT), highest)
    return quantize(vector, step, dead_zone)


def clustered(layout: Layout, seed: int) -> Vector:
    """Laplace values whose rows and columns are unevenly active, as in real updates."""
    rng = np.random.default_rng(seed)
    parts = []
    for tensor in layout.tensors:
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        values = rng.laplace(size=(rows, tensor.size // rows))
        values *= rng.lognormal(0, 1.5, (rows, 1)) * rng.lognormal(0, 1.5, (1, tensor.size // rows))
        values[rng.random(rows) < 0.2] = 0
        parts.append(values.ravel())
    return (np.concatenate(parts) * 1e-3).astype(np.float32)


def planted(layout: Layout, seed: int, rank: int = 3) -> Vector:
    """As real updates are: a few directions in each matrix, and heavy-tailed values whose rows are unevenly active."""
    rng = np.random.default_rng(seed)
    parts = []
    for tensor in layout.tensors:
        m, n = tensor.matrix
        noise = rng.standard_t(3, (m, n)) * rng.lognormal(0, 0.7, (m, 1))
        strong = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
        parts.append((noise + 2 * strong).ravel())
    return (np.concatenate(parts) * 1e-3).astype(np.float32)


def code(layout: Layout, seed: int, *, step: float = 1.0, scale: float = 1.0) -> bytes:
    """A code of the global model: a planted vector, its largest value ``scale``, quantized at ``step`` root mean
    squares."""
    vector = planted(layout, seed).astype(np.float64)
    vector *= scale / np.abs(vector).max()
    encoder = VectorEncoder(vector.astype(np.float32), layout)
    return encoder.encode(step * encoder.rms)


def coded(layout: Layout, *seeds: int) -> CodedState:
    """A version of the global model with a code for each seed."""
    return CodedState(layout, tuple(code(layout, seed) for seed in seeds))


SMALL = 3000
"""Elements of a small block."""


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """In here the codec cuts layouts into blocks of at most ``SMALL`` elements."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("blocks", "update", "vector"):
            patch.setattr(f"edge_client.codec.{module}.blocks", functools.partial(blocks, limit=SMALL))
        yield


def _flat(n: int) -> Layout:
    return Layout((TensorSpec("w", (n,)),))


def examples() -> list[Example]:
    """The table."""
    rng = np.random.default_rng(7)
    spike = np.zeros(CONV.size, np.float32)
    spike[1234] = -3.5
    return [
        Example("clustered", CONV, clustered(CONV, 1)),
        Example("logistic", LOGISTIC, clustered(LOGISTIC, 2)),
        Example("planted", PLANTED, planted(PLANTED, 3)),
        Example("gauss", _flat(20_000), rng.standard_normal(20_000).astype(np.float32)),
        Example("constant", CONV, np.full(CONV.size, 0.25, np.float32)),
        Example("spike", CONV, spike),
        Example("zero", CONV, np.zeros(CONV.size, np.float32)),
        Example("one", _flat(1), np.array([0.7], np.float32)),
        Example("three", _flat(3), np.array([1.0, -1.0, 0.5], np.float32)),
        Example(
            "thin",
            Layout((TensorSpec("w", (500, 1)), TensorSpec("v", (1, 500)))),
            rng.laplace(size=1000).astype(np.float32),
        ),
        Example("empty", Layout((TensorSpec("w", (0, 3)),)), np.zeros(0, np.float32)),
        Example("subnormal", _flat(300), np.full(300, 1e-44, np.float32)),
        Example("minute", _flat(300), (rng.standard_normal(300) * 1e-36).astype(np.float32)),
        Example("huge", _flat(300), (rng.uniform(-1, 1, 300) * 3.4e38).astype(np.float32)),
    ]


@pytest.fixture(params=examples(), ids=lambda example: example.name)
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.param
    return found


@pytest.fixture(scope="session")
def conv() -> Example:
    return examples()[0]


@pytest.fixture(scope="session")
def logistic() -> Example:
    return examples()[1]
