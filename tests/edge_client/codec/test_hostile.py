"""Truncated, corrupted and hostile bytes give one error, or a result of the right shape, and never much memory."""

import struct
import time
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from edge_client.codec import versions
from edge_client.codec.entropy import decode_levels, encode_levels
from edge_client.codec.integers import CONSTANT, PCODEC, SPARSE, pack, section, unpack, varint
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.lowrank import LEVEL_LIMIT
from edge_client.codec.update import CodecSettings, _layouts_digest, decode_update, encode_update
from edge_client.codec.vector import decode_vector
from edge_client.errors import CodecError
from tests.edge_client.codec.conftest import code, planted
from tests.edge_client.codec.hostile import COUNT, DECODERS, LAYOUT, LAYOUTS, feed, seeds


@pytest.mark.parametrize("name", DECODERS)
def test_valid_bytes_are_taken(name):
    assert all(feed(name, data) for data in seeds()[name])


@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"scalars"}))
def test_every_truncation_is_refused(name):
    for data in seeds()[name]:
        for end in range(0, len(data), max(1, len(data) // 100)):
            assert not feed(name, data[:end])
        # What follows a pcodec file in a list is not looked at.
        assert feed(name, data + b"\0") == (name == "list" and data[0] == PCODEC)


@st.composite
def damaged(draw):
    """Valid bytes with flipped bits, other bytes, runs taken out, and runs of another valid file put in."""
    name = draw(st.sampled_from(sorted(DECODERS)))
    known = seeds()[name]
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "set", "cut", "splice", "insert"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if data:
                data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 40))]
            case "splice":
                other = draw(st.sampled_from(known))
                start = draw(st.integers(0, max(len(other) - 1, 0)))
                run = other[start : start + draw(st.integers(1, 300))]
                data[at : at + draw(st.sampled_from([0, len(run)]))] = run
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=6))
    return name, bytes(data)


@given(damaged())
@settings(max_examples=400, deadline=5000)
def test_damage_is_refused_or_harmless(case):
    feed(*case)


@given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=200))
@settings(max_examples=150)
def test_any_bytes_are_refused_or_harmless(name, data):
    feed(name, data)


def framed(payload, vectors, scalars=None, digest=None):
    header = msgspec.msgpack.encode([digest or _layouts_digest(LAYOUTS), scalars or {}, vectors])
    return b"FU\x02" + varint(len(header)) + header + payload


ENDLESS = b"\xff\xff\xff\xff\x7f"
"""A varint of 2^35 - 1."""


@given(
    st.dictionaries(st.sampled_from(["delta", "buffers", "x", ""]), st.lists(st.integers(-1, 2**40), max_size=3)),
    st.dictionaries(st.text(max_size=4), st.floats() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3)),
    st.none() | st.binary(min_size=7, max_size=9),
    st.binary(max_size=50),
)
@settings(max_examples=150)
def test_well_formed_headers_that_lie(vectors, scalars, digest, payload):
    data = framed(payload, vectors, scalars, digest)
    for name in ("update", "scalars", "blocks"):
        feed(name, data)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("length", [0, 1, 20, 4 * LAYOUT.size, 2**34 - 1, 2**40])
def test_lengths_that_lie(kind, length):
    body = b"\0" * min(length, 4 * LAYOUT.size)
    data = framed(body, {"buffers": [0, 0], "delta": [kind, length]})
    right = (kind in (0, 1) and length == 0) or (kind == 2 and length == 4 * LAYOUT.size)
    assert feed("update", data) == right


def vector_of(ranks, levels, step=1.0, moved=b"\0\0\0"):
    """A quantized vector of one block that says what it is told to."""
    return struct.pack("<f", step) + b"\0\0\0" + section(pack(np.array(ranks, np.uint32))) + moved + levels


@pytest.mark.parametrize("ranks", [(16, 0), (0, 5), (2**32 - 1, 2**32 - 1), (64, 64)])
def test_ranks_above_the_limit_are_refused_before_anything_is_made(ranks):
    # `w` bears 15 directions, `conv` 4.
    tracemalloc.start()
    try:
        assert not feed("vector", vector_of(ranks, b"\0"))
        assert tracemalloc.get_traced_memory()[1] < 8 * LAYOUT.size + 2**17
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", [1, LEVEL_LIMIT, LEVEL_LIMIT + 1, 2**31 - 1])
@pytest.mark.parametrize("step", [1e-45, 1.0, 3.4e38])
@pytest.mark.parametrize("moved", [b"\x7f\x7f\x7f", b"\x80\x80\x80"])
def test_factors_of_any_levels(level, step, moved):
    sides = [(30, 15), (120, 15), (9, 4), (36, 4)]
    told = Layout((*LAYOUT.tensors, *(TensorSpec("", side) for side in sides)))
    values = np.full(told.size, level, np.int32)
    values[::2] *= -1
    data = vector_of((15, 4), encode_levels(np.arange(told.size), values, told), step, moved)
    assert feed("vector", data) == (level <= LEVEL_LIMIT)


@pytest.mark.parametrize("tag", range(256))
def test_lists_of_any_coder(tag):
    for rest in (b"", ENDLESS, b"\0" * 100, b"\xff" * 100, b"\x01" * 5000):
        feed("list", bytes([tag]) + rest)


def test_lists_in_lists_end():
    """A list of mostly zeros holds two lists: of at most half its integers each, so that the nesting has an end."""
    data = bytes([CONSTANT]) + b"\0"
    for hits in (1, 2, 4, 9, 20, 40, 90, 200, 400, 800, 2000):
        gaps = data if hits < 1000 else bytes([SPARSE]) + ENDLESS
        data = bytes([SPARSE]) + varint(hits) + section(gaps) + data
        feed("list", data)
    feed("list", bytes([SPARSE, 1]) * 3000)


BOMBS = {
    "values": np.full(30_000_000, 5, np.uint32),
    "two values": np.repeat(np.array([1, 2], np.uint32), 5_000_000),
    "other type": np.zeros(COUNT, np.float64),
}


@pytest.mark.parametrize("values", BOMBS.values(), ids=BOMBS)
def test_a_pcodec_file_of_more_than_it_should_hold_is_refused_unread(values):
    config = ChunkConfig(mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    data = bytes([PCODEC]) + bytes(standalone.simple_compress(values, config))
    # Of processor time, which a busy machine does not stretch.
    began = time.process_time()
    assert not feed("list", data)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("count", [0, 1, 2**22, 2**31 - 1, 2**35 - 1])
def test_counts_of_levels_that_lie(count):
    feed("levels", varint(count) + section(pack(np.full(len(LAYOUT.tensors), 5, np.uint32))) + b"\0" * 9)
    assert not feed("levels", varint(count) + ENDLESS)


def peak_of(decode, data):
    tracemalloc.start()
    try:
        decode(data)
    except CodecError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


BIG = Layout((TensorSpec("w", (600, 700)), TensorSpec("b", (600,))))


@pytest.mark.parametrize("step", [0.01, 0.3, 3.0])
def test_memory_stays_in_proportion_to_the_model(step):
    """Also with damage: at most what the densest valid bytes take, some ten times a block's elements."""
    data = encode_update({"delta": planted(BIG, 1)}, {"delta": BIG}, {}, CodecSettings(target="step", value=step)).data
    rng = np.random.default_rng(2)
    for flips in (0, 1, 1, 1, 2, 3, 5, 9):
        bad = bytearray(data)
        for at in rng.integers(3, min(len(data), 400), flips):
            bad[at] = rng.integers(256)
        assert peak_of(lambda found: decode_update(found, {"delta": BIG}), bytes(bad)) < 20 * 4 * BIG.size


def test_the_densest_and_widest_levels_take_no_more():
    everywhere = np.full(BIG.size, 2**31 - 1, np.int32)
    data = encode_levels(np.arange(BIG.size), everywhere, BIG)
    assert peak_of(lambda found: decode_levels(found, BIG), data) < 20 * 4 * BIG.size


def test_deltas_take_no_more_memory_than_their_model_whatever_their_codes_claim():
    old, new = (versions.CodedState(BIG, (code(BIG, 1, step=3.0), code(BIG, seed, step=3.0))) for seed in (2, 3))
    good, rng = versions.encode_delta(old, new), np.random.default_rng(5)
    for flips in (0, 1, 1, 2, 5):
        bad = bytearray(good)
        for at in rng.integers(20, min(len(bad), 400), flips):
            bad[at] = rng.integers(256)
        assert peak_of(lambda found: versions.apply_delta(old, found, BIG), bytes(bad)) < 20 * 4 * BIG.size


def test_a_list_is_bounded_by_what_its_reader_expects():
    for count in (0, 1, 4096, 4097):
        with pytest.raises(CodecError):
            unpack(memoryview(bytes([PCODEC]) + b"pco!" + b"\0" * 20), count, "list")


def test_offsets_of_any_value_saturate():
    flat = Layout((TensorSpec("b", (9,)),))
    levels = encode_levels(np.arange(9), np.full(9, 2**31 - 1, np.int32), flat)
    data = struct.pack("<f", 3.4e38) + b"\x7f\x80\x7f" + levels
    assert np.isfinite(decode_vector(memoryview(data), flat, "vector")).all()
