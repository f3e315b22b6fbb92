"""How versions are coded: near to the exact model, in bounded bytes, the same after a restart."""

import numpy as np
import pytest

from broker_server.coding import Coder, code_at
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.vector import decode_vector
from edge_client.codec.versions import CODES_LIMIT, CodedState, encode_delta

LAYOUT = Layout((TensorSpec("w", (40, 60)), TensorSpec("b", (40,))))
ORIGIN = CodedState(LAYOUT)


def drift(rounds, seed=0):
    """Exact models round after round: low-rank steps that persist, and noise."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((40, 2)), rng.standard_normal((2, 60))
    at = np.zeros(LAYOUT.size)
    for _ in range(rounds):
        left += rng.standard_normal((40, 2))
        at[: 40 * 60] += (left @ right).ravel() * 0.01
        at += rng.standard_normal(LAYOUT.size) * 0.02
        yield at.copy()


def coded(rounds, step=1.0, noise=0.07):
    coder = Coder.after(ORIGIN, 0, noise)
    for target in drift(rounds):
        state, coder = coder.encode(target, step)
        yield target, state, coder


def test_a_version_leaves_out_no_more_than_its_share():
    for target, state, _ in coded(25, step=3.0, noise=0.02):
        assert np.square(target - state.offset).sum() <= 0.025 * np.square(target).sum()


def test_what_is_left_out_does_not_add_up():
    left = [np.abs(target - state.offset).mean() for target, state, _ in coded(60)]
    assert max(left[10:]) < 3 * min(left[10:])


def test_an_anchor_serves_ten_versions_and_deltas_skip_what_both_sides_have():
    states = [ORIGIN, *(state for _, state, _ in coded(30, step=0.5))]
    ages = [coder.age for _, _, coder in coded(30, step=0.5)]
    assert ages == [*range(1, 10), 0] * 3
    for number in (3, 9):
        assert states[number].codes[:-1] == ()
    assert states[15].codes[:-1] == states[10].codes
    # Whoever holds any version of an anchor takes one code to another version of it.
    assert (
        encode_delta(states[11], states[19])
        == encode_delta(states[13], states[19])
        == encode_delta(states[10], states[19])
    )


def test_codes_that_stay_never_take_much_more_than_one_from_the_start():
    restarts, before = 0, 0
    for _, state, coder in coded(120, step=0.3):
        whole = len(Coder.after(ORIGIN, 0, 0.07).encode(state.offset.astype(np.float64), 0.3)[0].codes[0])
        assert sum(map(len, coder.kept)) <= 1.6 * whole
        restarts += len(coder.kept) < before
        before = len(coder.kept)
    assert restarts


def test_a_coder_goes_on_as_before_after_a_restart():
    for (_, state, coder), target in zip(coded(24), list(drift(25))[1:], strict=True):
        again = Coder.after(CodedState(LAYOUT, state.codes), coder.age, 0.07)
        np.testing.assert_array_equal(again.anchor, coder.anchor)
        assert again.encode(target, 1.0)[0].digest() == coder.encode(target, 1.0)[0].digest()


@pytest.mark.parametrize("step", [0.0, 1.0, 1e9])
def test_a_model_that_does_not_move_costs_nothing(step):
    coder = Coder.after(ORIGIN, 0, 0.07)
    for _ in range(500):
        state, coder = coder.encode(np.zeros(LAYOUT.size), step)
        assert len(state.codes) <= CODES_LIMIT
        assert not any(state.codes)


@pytest.mark.parametrize("step", [0.0, 1e-30, 1e30])
def test_any_step_leads_to_a_version(step):
    target = next(drift(1))
    state, _ = Coder.after(ORIGIN, 0, 0.07).encode(target, step)
    assert np.square(target - state.offset).sum() < 0.1 * np.square(target).sum()


@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize("peaked", [False, True])
def test_a_vector_is_told_at_the_noise_asked_for(noise, peaked):
    rng = np.random.default_rng(0)
    vector = (rng.standard_t(2, LAYOUT.size) if peaked else rng.normal(size=LAYOUT.size)).astype(np.float32)
    left = vector - decode_vector(memoryview(code_at(noise, vector, LAYOUT)), LAYOUT, "vector")
    assert np.square(left).sum() == pytest.approx(noise * np.square(vector).sum(), rel=0.1)


def test_nothing_is_told_of_zeros():
    assert code_at(0.5, np.zeros(LAYOUT.size, np.float32), LAYOUT) == b""
