import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec.lattice import (
    LatticeState,
    RawState,
    apply_delta,
    choose_exponent,
    encode_delta,
    origin,
    pack_state,
    place,
    refine,
    unpack_state,
)
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError

LAYOUT = Layout((TensorSpec("w", (20, 30)), TensorSpec("b", (20,))))


def random_state(rng, exponent, scale=5.0):
    k = np.rint(rng.standard_normal(LAYOUT.size) * scale * (rng.random(LAYOUT.size) < 0.3)).astype(np.int32)
    return LatticeState(exponent, k)


@given(st.integers(0, 2**32 - 1), st.integers(-12, 3), st.integers(-12, 3), st.sampled_from([0.0, 1.0, 300.0]))
@settings(max_examples=60, deadline=None)
def test_deltas_are_exact(seed, first, second, scale):
    rng = np.random.default_rng(seed)
    old, new = random_state(rng, first, scale), random_state(rng, second)
    found = apply_delta(old, encode_delta(old, new, LAYOUT), LAYOUT)
    assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.k, new.k)


def test_composite_equals_chain_and_refinement():
    rng = np.random.default_rng(1)
    versions = [origin(LAYOUT.size, 4)]
    for exponent in (-3, -3, -5):
        step = np.add(refine(versions[-1], exponent).k, random_state(rng, exponent).k, dtype=np.int32)
        versions.append(LatticeState(exponent, step))
    chained = versions[0]
    for old, new in pairwise(versions):
        chained = apply_delta(chained, encode_delta(old, new, LAYOUT), LAYOUT)
    composite = apply_delta(versions[0], encode_delta(versions[0], versions[3], LAYOUT), LAYOUT)
    assert chained.digest() == composite.digest() == versions[3].digest()
    back = apply_delta(versions[3], encode_delta(versions[3], versions[1], LAYOUT), LAYOUT)
    assert back.digest() == versions[1].digest()


@pytest.mark.parametrize(("highest", "width"), [(127, 1), (128, 2), (32767, 2), (32768, 4)])
def test_coordinates_are_kept_in_the_smallest_integers_that_hold_them(highest, width):
    wide = np.array([highest, 0, -highest], np.int32)
    state = LatticeState(0, wide)
    assert state.k.itemsize == width
    np.testing.assert_array_equal(state.k, wide)
    assert LatticeState(0, state.k).digest() == state.digest()
    np.testing.assert_array_equal(state.parameters(np.zeros(3, np.float32)), wide)


def test_origins_are_one_version():
    assert origin(9, 3).digest() == origin(9, -40).digest() != origin(8).digest()
    base = np.arange(9, dtype=np.float32)
    np.testing.assert_array_equal(origin(9, 3).parameters(base), base)


@pytest.mark.parametrize("highest", [1, 127, 128, 32767, 32768, 2**24 - 1])
def test_every_width_round_trips(highest):
    k = np.zeros(LAYOUT.size, np.int32)
    k[[3, 5]] = highest, -highest
    state = LatticeState(-20, k)
    assert unpack_state(pack_state(state), LAYOUT).digest() == state.digest()


def test_place_keeps_the_remainder():
    rng = np.random.default_rng(2)
    base = rng.standard_normal(LAYOUT.size).astype(np.float32)
    target = base.astype(np.float64) + rng.standard_normal(LAYOUT.size) * 0.01
    state, remainder = place(target, base, -8)
    assert np.abs(remainder).max() <= 2**-9 + 1e-6
    np.testing.assert_allclose(state.parameters(base) + remainder.astype(np.float64), target, atol=1e-9)
    fine = refine(state, -10)
    np.testing.assert_array_equal(fine.parameters(base), state.parameters(base))


def test_hysteresis_keeps_what_is_near_and_moves_the_rest_to_the_nearest_point():
    base = np.zeros(7, np.float32)
    held = LatticeState(0, np.array([2, 2, 2, 2, 2, -1, 0], np.int32))
    target = np.array([2.5, 2.74, 2.76, 1.26, 0.9, -1.8, 9.6])
    state, remainder = place(target, base, 0, held, 0.75)
    assert state.k.tolist() == [2, 2, 3, 2, 1, -2, 10]
    np.testing.assert_allclose(state.k + remainder, target, atol=1e-6)
    finer, _ = place(np.full(7, 2.3), base, -1, LatticeState(0, np.full(7, 2, np.int32)), 0.75)
    assert finer.k.tolist() == [4] * 7
    assert place(np.full(7, 2.3), base, -1)[0].k.tolist() == [5] * 7


def test_hysteresis_makes_a_noisy_walk_change_less():
    rng, base = np.random.default_rng(3), np.zeros(LAYOUT.size, np.float32)
    noise = rng.standard_normal((40, LAYOUT.size)) * 0.15
    moves = {}
    for reach in (0.5, 0.75, 1.0):
        state, moves[reach] = origin(LAYOUT.size), 0
        for target in 0.5 + noise:
            before = state.k
            state, _ = place(target, base, 0, state, reach)
            moves[reach] += np.count_nonzero(state.k != before)
    assert moves[0.5] > 2 * moves[0.75] > 4 * moves[1.0]


@pytest.mark.parametrize(
    ("std", "previous", "expected"),
    [(2**-10, None, -6), (2**-10, -8, -8), (2**-10, -3, -6), (0.0, None, 0), (0.0, -4, -4), (float("nan"), -4, -4)],
)
def test_choose_exponent(std, previous, expected):
    assert choose_exponent(std, 16, previous) == expected


def test_raw_states():
    values = np.random.default_rng(3).standard_normal(LAYOUT.size).astype(np.float32)
    old, new = RawState(np.zeros_like(values)), RawState(values)
    found = apply_delta(old, encode_delta(old, new, LAYOUT), LAYOUT)
    assert found.digest() == new.digest()
    np.testing.assert_array_equal(found.parameters(values), values)
    assert unpack_state(pack_state(new), LAYOUT).digest() == new.digest()
    with pytest.raises(CodecError, match="no exact delta"):
        encode_delta(old, origin(LAYOUT.size), LAYOUT)


@pytest.mark.parametrize("raw", [False, True])
def test_damage_never_passes(raw):
    rng = np.random.default_rng(4)
    old, new = random_state(rng, -3), random_state(rng, -4)
    if raw:
        old, new = RawState(old.k.astype(np.float32)), RawState(new.k.astype(np.float32))
    for data, read in (
        (encode_delta(old, new, LAYOUT), lambda found: apply_delta(old, found, LAYOUT)),
        (pack_state(new), lambda found: unpack_state(found, LAYOUT)),
    ):
        for end in range(0, len(data), max(1, len(data) // 60)):
            with pytest.raises(CodecError):
                read(data[:end])
        with pytest.raises(CodecError):
            read(data + b"\0")
        for _ in range(150):
            bad = bytearray(data)
            bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
            # Spare bits may be free to change; then the state must still be the right one, which its digest proves.
            with contextlib.suppress(CodecError):
                assert read(bytes(bad)).digest() == new.digest()


def test_wrong_version_is_refused():
    rng = np.random.default_rng(5)
    old, new, other = (random_state(rng, -3) for _ in range(3))
    with pytest.raises(CodecError, match="leads from version"):
        apply_delta(other, encode_delta(old, new, LAYOUT), LAYOUT)


def test_bounds():
    with pytest.raises(CodecError, match="out of range"):
        LatticeState(0, np.array([2**24], np.int32))
    with pytest.raises(CodecError, match="out of range"):
        refine(LatticeState(0, np.array([2**23], np.int32)), -1)
    with pytest.raises(CodecError, match="cannot rise"):
        refine(origin(3), 1)
    with pytest.raises(CodecError, match="exponent"):
        origin(3, 101)
    for bad in (np.nan, np.inf, 1e9):
        with pytest.raises(CodecError, match="diverged"):
            place(np.array([bad]), np.zeros(1, np.float32), -3)
    with pytest.raises(CodecError, match="layout"):
        encode_delta(origin(3), origin(3), LAYOUT)
    with pytest.raises(ValueError, match="read-only"):
        origin(3).k[0] = 1
