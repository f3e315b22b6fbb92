import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.codec import lowrank
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.lowrank import LEVEL_LIMIT, RANK_LIMIT, Factors, factorize, floor, most, sketch, suits
from edge_client.codec.quantize import centroids
from edge_client.codec.vector import VectorEncoder, decode_vector


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def factors_of(matrix, step):
    """Factors and the centroids of the right one; None where none is worth its bits."""
    found = factorize(matrix, sketch(matrix, floor(matrix.shape, step)), step)
    return None if found is None else (found[0], centroids(found[1], found[0].right))


def whole(factors, step, offsets=(-20, 5, 31)):
    m, n = len(factors.left), len(factors.right)
    matrix = np.zeros((m, n), np.float32)
    for rows, product in factors.product(step, offsets):
        matrix[rows] = product
    return matrix


def low(rng, shape, rank, scale=1.0):
    left, right = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return (scale * left @ right).astype(np.float32)


LEVELS = st.integers(-LEVEL_LIMIT, LEVEL_LIMIT) | st.integers(-3, 3)


@st.composite
def any_factors(draw):
    m, n, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    left, right = (
        np.array(draw(st.lists(LEVELS, min_size=side * rank, max_size=side * rank)), np.int32).reshape(side, rank)
        for side in (m, n)
    )
    return Factors(left, right)


def exact_product(factors, step, offsets):
    """The product in integers and fractions of Python."""
    left, right = factors.left.tolist(), factors.right.tolist()

    def value(level):
        return math.copysign(abs(level) + offsets[min(abs(level), 3) - 1] / 128, level) if level else 0.0

    norms = [max(1, math.isqrt(sum(row[i] ** 2 for row in left))) for i in range(factors.rank)]
    c = [[value(level) / norm for level, norm in zip(row, norms, strict=True)] for row in right]
    q = 24 - math.frexp(max(abs(one) for row in c for one in row))[1]
    d = [[round(Fraction(one) * Fraction(2) ** q) for one in row] for row in c]
    sums = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in d] for row in left]
    assert max(abs(one) for row in sums for one in row) < 2**53
    scale = Fraction(step) / Fraction(2) ** q
    return np.array([[float(one * scale) for one in row] for row in sums], np.float64).astype(np.float32)


@given(any_factors(), st.floats(2**-20, 2**20, width=32), st.tuples(*[st.integers(-128, 127)] * 3))
@settings(max_examples=150, deadline=None)
def test_the_product_is_that_of_exact_integers(factors, step, offsets):
    if factors.exact:
        np.testing.assert_array_equal(whole(factors, step, offsets), exact_product(factors, step, offsets))


def test_no_order_of_summation_changes_a_bit(monkeypatch):
    rng = np.random.default_rng(1)
    # 64 directions, close to the largest levels: sums come near to 2^53.
    left, right = (rng.integers(-(2**21), 2**21, (side, RANK_LIMIT)).astype(np.int32) for side in (130, 140))
    factors = Factors(left, right)
    assert factors.exact
    first = whole(factors, 0.3)
    for turned in (slice(None, None, -1), rng.permutation(RANK_LIMIT)):
        other = Factors(left[:, turned], right[:, turned])
        np.testing.assert_array_equal(whole(other, 0.3), first)
    for piece in (1, 999, 10**9):
        monkeypatch.setattr(lowrank, "_PIECE", piece)
        np.testing.assert_array_equal(whole(factors, 0.3), first)
    matrix = whole(Factors(np.asfortranarray(left), np.asfortranarray(right)), 0.3)
    np.testing.assert_array_equal(matrix, first)


@pytest.mark.parametrize("level", [LEVEL_LIMIT + 1, 2**31 - 1, -(2**31), -LEVEL_LIMIT - 1])
def test_levels_that_are_not_summed_exactly_are_told(level):
    small, large = np.ones((8, 2), np.int32), np.ones((8, 2), np.int32)
    large[3, 1] = level
    assert Factors(small, small).exact
    assert not Factors(large, small).exact
    assert not Factors(small, large).exact


def test_columns_whose_squares_are_not_summed_exactly_are_told():
    long = np.full((300, 1), LEVEL_LIMIT, np.int32)
    assert not Factors(long, np.ones((8, 1), np.int32)).exact
    assert Factors(long[:200], np.ones((8, 1), np.int32)).exact


@pytest.mark.parametrize("level", [0, 1, LEVEL_LIMIT])
@pytest.mark.parametrize("step", [1e-45, 1.0, 3.4e38])
def test_the_largest_factors_do_not_warn(level, step):
    side = np.full((64, 8), level, np.int32)
    product = whole(Factors(side, side), step, (127, -128, 127))
    assert not np.isnan(product).any()
    assert (product == 0).all() == (level == 0)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_planted_directions_are_told_at_a_fraction_of_the_bits(rank):
    rng = np.random.default_rng(rank)
    shape = (200, 300)
    matrix = low(rng, shape, rank) + 0.05 * rng.standard_normal(shape).astype(np.float32)
    layout = Layout((TensorSpec("w", shape),))
    flat = Layout((TensorSpec("w", (matrix.size,)),))
    step = 0.3 * float(matrix.std())
    told, scalar = (VectorEncoder(matrix.ravel(), one) for one in (layout, flat))
    # Both leave out what a step leaves out; where there is no matrix nothing can be told by factors.
    assert len(told.encode(step)) < 0.6 * len(scalar.encode(step))
    noise = [float((one.residual**2).sum() / (matrix**2).sum()) for one in (told, scalar)]
    assert noise[0] < 1.1 * noise[1]


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_rank_that_was_planted_is_found(rank):
    rng = np.random.default_rng(rank)
    matrix = low(rng, (200, 300), rank) + 0.1 * rng.standard_normal((200, 300)).astype(np.float32)
    factors, offsets = factors_of(matrix, 0.5)
    assert factors.rank == rank
    left = matrix - whole(factors, 0.5, offsets)
    assert float((left**2).mean()) < 0.5**2


def test_noise_has_no_directions():
    matrix = np.random.default_rng(2).standard_normal((200, 300)).astype(np.float32)
    assert factors_of(matrix, 1.5) is None


MATRICES = {
    "zero": np.zeros((40, 30), np.float32),
    "constant": np.full((40, 30), 0.25, np.float32),
    "one-hot": np.pad(np.full((1, 1), 7.0, np.float32), ((20, 19), (3, 26))),
    "one row": np.outer(np.eye(40)[5], np.arange(30.0)).astype(np.float32),
    "identity": np.eye(40, 30, dtype=np.float32),
    "collinear": np.outer(np.arange(40.0), np.ones(30)).astype(np.float32) + np.float32(1e-6),
    "nearly equal": low(np.random.default_rng(3), (40, 30), 1) * np.float32([[1], [1.0000001]] * 20),
    "graded": (10.0 ** -np.arange(40)[:, None] * np.ones(30)).astype(np.float32),
    "signs": np.where(np.random.default_rng(4).random((40, 30)) < 0.5, -1, 1).astype(np.float32),
    "tall": low(np.random.default_rng(5), (3000, 8), 2),
    "wide": low(np.random.default_rng(6), (8, 3000), 2),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("multiple", [1e-4, 0.05, 1.0, 3.0])
def test_degenerate_matrices_are_told_or_left(matrix, multiple):
    size = float(np.abs(matrix).max()) or 1.0
    step = float(np.float32(multiple * size))
    found = factors_of(matrix, step)
    if found is not None:
        factors, offsets = found
        assert factors.exact
        assert 0 < factors.rank <= most(matrix.shape)
        # What factors leave out never has more energy than the matrix.
        assert float(((matrix - whole(factors, step, offsets)) ** 2).sum()) < float((matrix**2).sum())


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("scale", [1e-30, 1e-14, 1e-11, 1.0, 1e11, 1e14, 1e30])
@pytest.mark.parametrize("multiple", [0.01, 1.0])
def test_any_scale_is_told_as_it_is_decoded(matrix, scale, multiple):
    vector = (matrix.ravel() * scale).astype(np.float32)
    if not vector.any():
        return
    layout = Layout((TensorSpec("w", matrix.shape),))
    encoder = VectorEncoder(vector, layout)
    data = encoder.encode(multiple * encoder.rms)
    told = decode_vector(memoryview(data), layout, "vector").astype(np.float64)
    highest = float(np.abs(vector).max())
    np.testing.assert_allclose(told + encoder.residual, vector, rtol=0, atol=1e-6 * highest + 1e-44)
    assert float(np.abs(encoder.residual).max()) <= 1.05 * max(multiple * encoder.rms, highest * 1e-6)


@pytest.mark.parametrize(
    ("shape", "suited", "rank"),
    [
        ((7, 900), False, 3),
        ((8, 8), True, 4),
        ((900, 8), True, 4),
        ((2000, 500), True, RANK_LIMIT),
        ((1, 50), False, 0),
    ],
)
def test_which_matrices_and_ranks_there_are(shape, suited, rank):
    assert suits(shape) is suited
    assert most(shape) == rank
