"""What must hold whatever bytes a decoder is given, for the tests and for the fuzzer (``fuzz.py``)."""

import functools
import warnings
from collections.abc import Callable

import numpy as np

from edge_client.codec.control import coded_control, decode_control, raw_control
from edge_client.codec.entropy import decode_levels, encode_levels
from edge_client.codec.integers import pack, unpack
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import Model, apply_model_delta, encode_model_delta, pack_model, unpack_model
from edge_client.codec.update import CodecSettings, UpdateReader, decode_scalars, decode_update, encode_update
from edge_client.codec.vector import VectorEncoder, decode_vector
from edge_client.codec.versions import CodedState, RawState, apply_delta, encode_delta, pack_state, unpack_state
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import code, planted, small_blocks

LAYOUT = Layout(
    (
        TensorSpec("w", (30, 120)),
        TensorSpec("conv", (9, 4, 3, 3)),
        TensorSpec("b", (30,)),
        TensorSpec("flat", (2, 900)),
        TensorSpec("none", (0, 4)),
        TensorSpec("scale", ()),
    )
)
LAYOUTS = {"delta": LAYOUT, "buffers": Layout((TensorSpec("mean", (5,)),))}
COUNT = 700
"""Of the integers in a list."""


_FIRST, _SECOND, _THIRD = (code(LAYOUT, seed, step=2.0) for seed in (1, 2, 3))
OLD, NEW = CodedState(LAYOUT, (_FIRST, _SECOND)), CodedState(LAYOUT, (_FIRST, b"", _THIRD))
RAW = RawState(planted(LAYOUT, 4))
OLD_MODEL, NEW_MODEL = (Model(state, np.full(3, len(state.codes), np.float32)) for state in (OLD, NEW))
CONTROLLED = [
    Model(NEW, NEW_MODEL.buffers, control)
    for control in (coded_control(code(LAYOUT, 5, step=2.0)), raw_control(planted(LAYOUT, 5)))
]


def _update(data: bytes) -> None:
    vectors = decode_update(data, LAYOUTS).vectors
    assert {name: vector.shape for name, vector in vectors.items()} == {"delta": (LAYOUT.size,), "buffers": (5,)}
    assert all(vector.dtype == np.float32 for vector in vectors.values())


def _blocks(data: bytes) -> None:
    with small_blocks():
        reader = UpdateReader(data, LAYOUTS)
        for number, size in enumerate((3000, 2755)):
            assert len(reader.block("delta", number)) <= size


def _vector(data: bytes) -> None:
    assert decode_vector(memoryview(data), LAYOUT, "vector").shape == (LAYOUT.size,)


def _levels(data: bytes) -> None:
    index, level = decode_levels(data, LAYOUT)
    assert len(np.unique(index)) == len(index) == len(level)
    assert not len(index) or 0 <= index.min() <= index.max() < LAYOUT.size
    assert level.all()


def _list(data: bytes) -> None:
    assert unpack(memoryview(data), COUNT, "list").shape == (COUNT,)


def _control(data: bytes) -> None:
    # No bytes are zeros, which is fine, and the tests want what is cut off to be refused.
    found = decode_control(data or b"\0", LAYOUT)
    assert found is not None
    assert found.shape == (LAYOUT.size,)


DECODERS: dict[str, Callable[[bytes], object]] = {
    "update": _update,
    "blocks": _blocks,
    "scalars": decode_scalars,
    "vector": _vector,
    "levels": _levels,
    "list": _list,
    "delta": lambda data: _known(apply_delta(OLD, data, LAYOUT)),
    "state": lambda data: _known(unpack_state(data, LAYOUT)),
    "model_delta": lambda data: _known(apply_model_delta(OLD_MODEL, data, LAYOUT)),
    "model": lambda data: _known(unpack_model(data, LAYOUT)),
    "control": _control,
}


def _known(found: CodedState | RawState | Model) -> None:
    """Nothing passes that was not encoded: digests see to that."""
    assert found.parameters(np.zeros(LAYOUT.size, np.float32)).shape == (LAYOUT.size,)
    if isinstance(found, Model) and (control := found.control_vector(LAYOUT)) is not None:
        assert control.shape == (LAYOUT.size,)
    assert found.digest() in {one.digest() for one in (NEW, RAW, NEW_MODEL, *CONTROLLED)}


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Valid bytes for each decoder."""
    delta, other = planted(LAYOUT, 1), planted(LAYOUT, 2, 0)
    buffers = np.arange(5, dtype=np.float32)
    rng = np.random.default_rng(3)
    updates = []
    for vector in (delta, other, np.zeros_like(delta), np.full_like(delta, np.nan)):
        for step in (0.05, 1.0, 4.0):
            sent = CodecSettings(target="step", value=step)
            updates.append(encode_update({"delta": vector, "buffers": buffers}, LAYOUTS, {"samples": 7}, sent).data)
    updates.append(encode_update({"delta": delta, "buffers": buffers}, LAYOUTS, {}, CodecSettings(kind="none")).data)
    with small_blocks():
        blocks = [
            encode_update(
                {"delta": delta, "buffers": buffers}, LAYOUTS, {}, CodecSettings(target="step", value=step)
            ).data
            for step in (0.3, 2.0)
        ]
    vectors = []
    for vector in (delta, other):
        encoder = VectorEncoder(vector, LAYOUT)
        vectors += [encoder.encode(step * encoder.rms) for step in (0.05, 1.0, 3.0)]
    lists = [np.full(COUNT, 9), rng.geometric(0.1, COUNT), rng.integers(0, 2**32, COUNT), rng.random(COUNT) < 0.01]
    level = np.rint(rng.standard_t(2, LAYOUT.size) * (rng.random(LAYOUT.size) < 0.3)).astype(np.int32)
    index = np.flatnonzero(level)
    return {
        "update": updates,
        "blocks": blocks,
        "scalars": updates,
        "vector": vectors,
        "levels": [encode_levels(index, level[index], LAYOUT)],
        "list": [pack(values.astype(np.uint32)) for values in lists],
        "delta": [encode_delta(OLD, NEW)],
        "state": [pack_state(NEW), pack_state(RAW)],
        "model_delta": [encode_model_delta(OLD_MODEL, model) for model in (NEW_MODEL, *CONTROLLED)],
        "model": [pack_model(model) for model in (NEW_MODEL, *CONTROLLED)],
        "control": [model.control for model in CONTROLLED],
    }


def feed(name: str, data: bytes) -> bool:
    """Whether a decoder takes ``data``. Other errors than CodecError, warnings and wrong shapes come out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            DECODERS[name](data)
        except CodecError:
            return False
    return True
