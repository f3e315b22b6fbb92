"""A residual at rest: close to what it was, and dropped where it does not belong."""

import numpy as np
import pytest

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError
from edge_client.feedback import add_residual, lengthening, pack_residual

LAYOUT = Layout((TensorSpec("w", (3, 4)), TensorSpec("b", (3,))))
SIZE = LAYOUT.size


def flat(size):
    return Layout((TensorSpec("w", (size,)),))


def recalled(data, layout, version=5):
    vector = np.zeros(layout.size, np.float32)
    add_residual(vector, data, layout, version)
    return vector


def residual(shape, size=200_000, seed=0):
    """What is left of a Laplace vector where everything above a dead zone of so many deviations was sent."""
    vector = np.random.default_rng(seed).laplace(size=size).astype(np.float32)
    return np.where(np.abs(vector) < shape, vector, 0).astype(np.float32)


@pytest.mark.parametrize("dead_zone", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e30])
def test_rest_costs_less_than_a_thousandth_of_the_energy(dead_zone, scale):
    values = residual(dead_zone) * np.float32(scale)
    layout = flat(values.size)
    data = pack_residual(values, layout, 5)
    assert len(data) < values.size + 32
    lost = recalled(data, layout).astype(np.float64) - values
    assert np.sum(lost**2) < 1e-3 * np.sum(values.astype(np.float64) ** 2)


def test_small_values_beside_a_large_one_are_kept():
    values = np.full(1000, 1e-3, np.float32)
    values[0] = -1.0
    found = recalled(pack_residual(values, flat(1000), 5), flat(1000))
    np.testing.assert_allclose(found, values, rtol=0.03)


def test_blocks_join_without_a_seam():
    values = np.linspace(-1, 1, 3 * 2**18 + 5, dtype=np.float32)
    found = recalled(pack_residual(values, flat(values.size), 5), flat(values.size))
    assert np.abs(found - values).max() < 1 / 127
    assert (found[0], found[-1]) == (-1, 1)
    assert (np.diff(found) >= 0).all()


def test_it_is_added_to_what_is_there():
    values = np.linspace(-1, 1, SIZE, dtype=np.float32)
    vector = np.full(SIZE, 10, np.float32)
    add_residual(vector, pack_residual(values, LAYOUT, 5), LAYOUT, 5)
    np.testing.assert_allclose(vector, 10 + values, atol=0.02)


def test_nothing_left_over_takes_no_bytes():
    assert pack_residual(np.zeros(SIZE, np.float32), LAYOUT, 5) == b""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    values = np.ones(SIZE, np.float32)
    values[3] = value
    with pytest.raises(CodecError, match="start from zero"):
        pack_residual(values, LAYOUT, 5)


DATA = pack_residual(np.linspace(-1, 1, SIZE, dtype=np.float32), LAYOUT, 5)
OTHERS = {
    "other names": Layout((TensorSpec("v", (3, 4)), TensorSpec("b", (3,)))),
    "other shapes of the same size": Layout((TensorSpec("w", (4, 3)), TensorSpec("b", (3,)))),
    "another order": Layout((TensorSpec("b", (3,)), TensorSpec("w", (3, 4)))),
    "another size": Layout((TensorSpec("w", (3, 4)),)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_that_of_another_layout_is_dropped(name):
    vector = np.ones(OTHERS[name].size, np.float32)
    with pytest.raises(CodecError, match="another layout"):
        add_residual(vector, DATA, OTHERS[name], 5)
    assert (vector == 1).all()


def test_that_of_a_version_that_the_server_has_gone_back_behind_is_dropped():
    with pytest.raises(CodecError, match="model version 5; the model is at 4"):
        add_residual(np.zeros(SIZE, np.float32), DATA, LAYOUT, 4)
    assert recalled(DATA, LAYOUT, 500).any()


def test_every_truncation_is_an_error_and_changes_nothing():
    for end in range(len(DATA)):
        vector = np.ones(SIZE, np.float32)
        with pytest.raises(CodecError):
            add_residual(vector, DATA[:end], LAYOUT, 5)
        assert (vector == 1).all()


@pytest.mark.parametrize(
    "bad",
    [
        DATA + b"\0",
        b"\x01" + DATA[1:],
        DATA[:10] + b"\0\0\x80\x7f" + DATA[14:],
        DATA[:10] + b"\0\0\xc0\x7f" + DATA[14:],
        DATA[:10] + b"\0\0\x80\xbf" + DATA[14:],
        DATA[:10] + b"\0\0\0\0" + DATA[14:],
    ],
    ids=["longer", "older format", "infinite", "NaN", "negative", "zero"],
)
def test_damage_is_an_error(bad):
    with pytest.raises(CodecError, match=r"drop it|too many"):
        add_residual(np.zeros(SIZE, np.float32), bad, LAYOUT, 5)


def test_any_other_byte_gives_finite_values():
    for byte in range(14, len(DATA)):
        assert np.isfinite(recalled(DATA[:byte] + b"\x80" + DATA[byte + 1 :], LAYOUT)).all()


def test_its_bytes_are_pinned():
    values = np.array([0, 0.25, -1, 0.01], np.float32)
    digest = flat(4).digest[:8]
    assert pack_residual(values, flat(4), 300) == b"\x02" + digest + b"\xac\x02" + b"\0\0\x80\x3f" + bytes(
        [0, 64, 129, 13]
    )


def test_lengthening_restores_the_length_of_what_is_told():
    delta = np.array([3.0, 4.0, 12.0], np.float32)
    residual = np.array([3.0, 4.0, 2.0], np.float32)
    told = delta - residual
    assert lengthening(delta, residual) * np.linalg.norm(told) == pytest.approx(13)


@pytest.mark.parametrize(
    ("residual", "factor"),
    [([0, 0, 0], 1), ([0, 0, -5], 1), ([3, 4, 11], 2), ([3, 4, 12], 1)],
    ids=["all is told", "too much is told", "little is told", "nothing is told"],
)
def test_lengthening_is_from_1_to_2(residual, factor):
    assert lengthening(np.array([3, 4, 12], np.float32), np.array(residual, np.float32)) == factor
