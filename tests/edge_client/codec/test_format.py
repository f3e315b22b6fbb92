"""The specification, ``edge_client/codec/FORMAT.md``, is enough: a decoder written from it gives the same bits.

The golden files hold the formats still. Where a format changes on purpose, its version number does, and ``write`` makes
the files anew:

    python -c "from tests.edge_client.codec.test_format import write; write()"
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec.control import coded_control, raw_control
from edge_client.codec.entropy import encode_levels
from edge_client.codec.integers import pack
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import Model, apply_model_delta, encode_model_delta, pack_model, unpack_model
from edge_client.codec.update import CodecSettings, decode_update, encode_update
from edge_client.codec.vector import VectorEncoder
from edge_client.codec.versions import CodedState, RawState, apply_delta, encode_delta, pack_state, unpack_state
from tests.edge_client.codec import reference_decoder as reference
from tests.edge_client.codec.conftest import PLANTED, SMALL, code, planted, small_blocks

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = Layout((TensorSpec("w", (64, 100)), TensorSpec("b", (64,)), TensorSpec("v", (9, 80))))
BUFFERS = Layout((TensorSpec("mean", (3,)),))
BOTH = {"delta": LAYOUT, "buffers": BUFFERS}
ONE = {"delta": LAYOUT}
NONE = np.zeros(0, np.float32)


def plain(layout):
    return [(tensor.name, tensor.shape) for tensor in layout.tensors]


def same(found, vector):
    """Equal bits, except that any NaN is as good as another."""
    np.testing.assert_array_equal(np.array(found, np.float32), vector)


@pytest.mark.parametrize("step", [3.0, 0.3, 0.01])
@pytest.mark.parametrize("small", [False, True])
def test_updates(example, step, small):
    layouts = {"delta": example.layout}
    with small_blocks() if small else contextlib.nullcontext():
        data = encode_update(
            {"delta": example.vector}, layouts, {"samples": 70000}, CodecSettings(target="step", value=step)
        ).data
        vector = decode_update(data, layouts).vectors["delta"]
    limit = SMALL if small else reference.BLOCK_LIMIT
    found, scalars = reference.update(data, {"delta": plain(example.layout)}, limit)
    same(found["delta"], vector)
    assert scalars == {"samples": 70000}


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1.0, np.nan, 0.0], [1.5, -2.25, 1e-7]])
def test_vectors_that_are_not_quantized(values):
    vectors = {"delta": np.zeros(LAYOUT.size, np.float32), "buffers": np.array(values, np.float32)}
    data = encode_update(vectors, BOTH, {}, CodecSettings()).data
    found, _ = reference.update(data, {name: plain(layout) for name, layout in BOTH.items()})
    for name, vector in decode_update(data, BOTH).vectors.items():
        same(found[name], vector)


@st.composite
def sparse(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4))
    layout = Layout(tuple(TensorSpec(str(i), shape) for i, shape in enumerate(shapes)))
    places = draw(st.sets(st.integers(0, layout.size - 1))) if layout.size else set()
    values = st.integers(-(2**31) + 1, 2**31 - 1) | st.integers(-2, 2)
    return layout, np.array(sorted(places), np.int64), np.array([draw(values.filter(bool)) for _ in places], np.int32)


@given(sparse())
@settings(max_examples=60, deadline=None)
def test_levels(case):
    layout, index, level = case
    data = encode_levels(index, level, layout)
    dense = np.zeros(layout.size, np.int64)
    dense[index] = level
    assert reference.levels(data, plain(layout)) == dense.tolist()


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), max_size=60) | st.lists(st.just(7), min_size=1))
def test_lists(values):
    assert reference.integers(pack(np.array(values, np.uint32)), len(values)) == values


def test_coded_versions():
    with small_blocks():
        first, second, third = (code(PLANTED, seed, step=step) for seed, step in ((1, 2.0), (2, 0.7), (3, 4.0)))
        old, new = CodedState(PLANTED, (first, second)), CodedState(PLANTED, (first, b"", third))
        steps = [(CodedState(PLANTED), old), (old, new), (new, CodedState(PLANTED))]
        deltas = [(before, encode_delta(before, after), after.offset) for before, after in steps]
        for before, data, after in deltas:
            found = reference.delta(data, (list(before.codes), before.offset.tolist()), plain(PLANTED), SMALL)
            same(found[1], after)
        same(reference.packed_state(pack_state(new), plain(PLANTED), SMALL)[1], new.offset)
        base = np.random.default_rng(5).standard_normal(PLANTED.size).astype(np.float32)
        same(reference.parameters((new.codes, new.offset.tolist()), base.tolist()), new.parameters(base))


def test_raw_versions():
    old, new = (RawState(planted(LAYOUT, seed)) for seed in (1, 2))
    same(reference.delta(encode_delta(old, new), old.values.tolist(), plain(LAYOUT)), new.values)
    same(reference.packed_state(pack_state(new), plain(LAYOUT)), new.values)


def test_damage_is_refused_by_both():
    data = make()["update"]
    rng = np.random.default_rng(1)
    for _ in range(60):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        outcomes = []
        for decode, error in ((reference_update, reference.RefusedError), (first_update, Exception)):
            try:
                outcomes.append(decode(bytes(bad), BOTH))
            except (error, ValueError, TypeError, AttributeError):
                outcomes.append(None)
        assert (outcomes[0] is None) == (outcomes[1] is None)
        if outcomes[0] is not None:
            for name in BOTH:
                same(outcomes[0][name], outcomes[1][name])


def reference_update(data, layouts, limit=reference.BLOCK_LIMIT):
    return reference.update(data, {name: plain(layout) for name, layout in layouts.items()}, limit)[0]


def first_update(data, layouts):
    return decode_update(data, layouts).vectors


def make():
    """What the golden files hold, by name."""
    vectors = {"delta": planted(LAYOUT, 1), "buffers": np.array([1.5, -2.25, 1e-7], np.float32)}
    scalars = {"samples": 600, "loss": 0.5}
    sent = CodecSettings(target="step", value=0.5)
    first, second = code(LAYOUT, 1, step=1.0), code(LAYOUT, 2, step=0.5)
    third = VectorEncoder(np.random.default_rng(3).standard_normal(LAYOUT.size, np.float32), LAYOUT).encode(0.02)
    old, new = CodedState(LAYOUT, (first, second)), CodedState(LAYOUT, (first, third))
    model = Model(new, np.array([0.5, -2.0], np.float32))
    made = {
        "update": encode_update(vectors, BOTH, scalars, sent).data,
        "delta": encode_delta(old, new),
        "first": encode_delta(CodedState(LAYOUT), old),
        "state": pack_state(new),
        "raw": pack_state(RawState(vectors["buffers"])),
        "model": pack_model(model),
        "model_delta": encode_model_delta(Model(old, np.zeros(2, np.float32)), model),
        "controlled": pack_model(Model(new, model.buffers, coded_control(third))),
        "controlled_delta": encode_model_delta(Model(old, NONE), Model(new, NONE, raw_control(vectors["delta"]))),
    }
    with small_blocks():
        made["blocks"] = encode_update({"delta": vectors["delta"]}, ONE, scalars, sent).data
    return made


def write():
    """Write the golden files: bytes, and SHA-256 of what they decode to."""
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.iterdir():
        old.unlink()
    made = make()
    for name, data in made.items():
        (GOLDEN / f"{name}.bin").write_bytes(data)
    hashes = {name: decoded[0] for name, decoded in decode(made).items()}
    (GOLDEN / "decoded.json").write_text(json.dumps(hashes, indent=2) + "\n")


def decode(files):
    """SHA-256 of what each file decodes to, by the codec and by the reference decoder."""
    here = apply_delta(CodedState(LAYOUT), files["first"], LAYOUT)
    there = reference.delta(files["first"], ([], [0.0] * LAYOUT.size), plain(LAYOUT))
    with small_blocks():
        in_blocks = first_update(files["blocks"], ONE)
    moved = apply_model_delta(Model(here, np.zeros(2, np.float32)), files["model_delta"], LAYOUT)
    stored = unpack_model(files["model"], LAYOUT)
    found = {
        "update": (first_update(files["update"], BOTH), reference_update(files["update"], BOTH)),
        "blocks": (in_blocks, reference_update(files["blocks"], ONE, SMALL)),
        "first": (here, there),
        "delta": (
            apply_delta(here, files["delta"], LAYOUT),
            reference.delta(files["delta"], there, plain(LAYOUT)),
        ),
        "state": (unpack_state(files["state"], LAYOUT), reference.packed_state(files["state"], plain(LAYOUT))),
        "raw": (unpack_state(files["raw"], BUFFERS), reference.packed_state(files["raw"], plain(BUFFERS))),
        "model": (stored, reference_model(files["model"])),
        "model_delta": (moved, reference_model(files["model_delta"], there)),
        "controlled": (unpack_model(files["controlled"], LAYOUT), reference_model(files["controlled"])),
        "controlled_delta": (
            apply_model_delta(Model(here, NONE), files["controlled_delta"], LAYOUT),
            reference_model(files["controlled_delta"], there),
        ),
    }
    return {name: tuple(fingerprint(one) for one in both) for name, both in found.items()}


def reference_model(data, held=None):
    """A packed model, or what a delta from a version leads to."""

    def read(inner):
        layout = plain(LAYOUT)
        return reference.packed_state(inner, layout) if held is None else reference.delta(inner, held, layout)

    return reference.model(data, read, plain(LAYOUT))


def fingerprint(found):
    """SHA-256 over all values of whatever a decoder returned."""
    sha = hashlib.sha256()
    match found:
        case Model():
            control = found.control_vector(LAYOUT)
            found = (found.state, found.buffers) if control is None else (found.state, found.buffers, control)
        case CodedState():
            found = (list(found.codes), found.offset)
        case RawState():
            found = found.values
        case dict():
            found = tuple(found[name] for name in sorted(found))
    if isinstance(found, tuple):
        for one in found:
            sha.update(fingerprint(one).encode())
    elif isinstance(found, list) and all(isinstance(one, bytes) for one in found):
        sha.update(b"".join(found))
    else:
        array = np.asarray(found)
        sha.update(array.astype("<i4" if array.dtype.kind == "i" else "<f4").tobytes())
    return sha.hexdigest()


def test_golden_files_decode_to_the_same_values_with_both():
    files = {path.stem: path.read_bytes() for path in GOLDEN.glob("*.bin")}
    hashes = json.loads((GOLDEN / "decoded.json").read_text())
    assert files.keys() == hashes.keys()
    for name, (first, second) in decode(files).items():
        assert first == hashes[name], name
        assert second == hashes[name], name


def test_golden_files_hold_what_they_should(monkeypatch):
    files = {path.stem: path.read_bytes() for path in GOLDEN.glob("*.bin")}
    assert {name: data[:3].hex() for name, data in files.items()} == {
        "update": "465502",
        "blocks": "465502",
        "delta": "464403",
        "first": "464403",
        "state": "465303",
        "raw": "465303",
        "model": "464201",
        "model_delta": "464201",
        "controlled": "465601",
        "controlled_delta": "465601",
    }
    assert b"pco!" in files["delta"], "they must pin pcodec's bytes too"
    ranks = []
    product = reference.product
    monkeypatch.setattr(
        reference, "product", lambda a, b, offsets, rank, step: ranks.append(rank) or product(a, b, offsets, rank, step)
    )
    for name, limit in (("update", reference.BLOCK_LIMIT), ("blocks", SMALL)):
        ranks.clear()
        reference_update(files[name], BOTH if name == "update" else ONE, limit)
        assert max(ranks) > 1, "they must pin factors too"
