"""The codecs that fedge is measured against do what their papers say, and rates are compared as they should be."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parent


def load(name: str) -> ModuleType:
    """A module of the benchmarks, found as the scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return importlib.import_module(name)


stc, eden, qsgd, plain = (load(f"contenders.{name}") for name in ("stc", "eden", "qsgd", "plain"))
ecsq, points = load("contenders.ecsq"), load("contenders.points")


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(100_000).astype(np.float32)


def test_stc_sends_the_largest_values_as_their_mean_magnitude():
    sent = stc.compress(np.array([0.1, -4.0, 0.0, 2.0, -0.2, 1.0], np.float32), 0.34)
    assert sent.decode().tolist() == [0, -3, 0, 3, 0, 0]
    # Distances 2 and 2 in unary (one zero in between each: "10"), two signs, the header.
    assert sent.bits() == stc.HEADER + 2 + 4


def test_stc_positions_take_the_bits_of_its_paper(normal):
    share = 0.01
    sent = stc.compress(normal, share)
    best = 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log(1 - share)))
    position = best + 1 / (1 - (1 - share) ** 2**best)
    assert (sent.bits() - stc.HEADER) / len(sent.index) == pytest.approx(position + 1, rel=0.02)


def test_a_vector_by_tensors_has_a_magnitude_for_each():
    vector = np.repeat(np.array([1.0, 5.0], np.float32), 8)
    assert min(nmse for _, nmse in stc.points(vector, [8, 8])) == 0
    assert min(nmse for _, nmse in stc.points(vector, [16])) > 0.1


def test_eden_has_the_error_of_lloyd_max(normal):
    found = dict(eden.points(normal[:70_000]))  # no power of two
    for bits, error in ((1, 0.363), (2, 0.1175), (3, 0.0345), (4, 0.0095)):
        rate = bits + eden.HEADER / 70_000
        assert found[rate] == pytest.approx(error, rel=0.02)


def test_eden_does_not_depend_on_where_the_energy_is(normal):
    vector = np.zeros(70_000, np.float32)
    vector[60_000:] = normal[:10_000]
    assert dict(eden.points(vector))[2 + eden.HEADER / 70_000] == pytest.approx(0.1175, rel=0.03)


def test_eden_below_a_bit_sends_a_part_of_the_coordinates(normal):
    bits, error = eden.points(normal)[0]
    assert bits == pytest.approx(eden.SHARES[0] + eden.HEADER / normal.size)
    assert error == pytest.approx(1 - eden.SHARES[0] * 2 / math.pi, abs=0.01)


def test_its_rotation_keeps_lengths(normal):
    rotated = eden.rotate(normal[:3000], np.random.default_rng(0))
    assert np.linalg.norm(rotated) == pytest.approx(float(np.linalg.norm(normal[:3000])))


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bucket", [0, 64])
def test_qsgd_has_no_bias(norm, bucket):
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(200)
    mean = sum(qsgd.quantize(vector, 4, bucket, norm, rng)[1] for _ in range(4000)) / 4000
    assert np.abs(mean - vector).max() < 0.25
    assert abs(float(mean @ vector) / float(vector @ vector) - 1) < 0.01


def test_qsgd_levels_are_multiples_of_the_norm():
    levels, decoded = qsgd.quantize(np.array([3.0, -4.0, 0.0]), 5, 0, "l2", np.random.default_rng(0))
    assert levels.tolist() == [3, -4, 0]
    assert decoded.tolist() == [3, -4, 0]


def test_elias_omega_codes_have_their_lengths():
    # 1: "0"; 2: "100"; 4: "10 100 0"; 16: "10 100 10000 0".
    for value, bits in ((1, 1), (2, 3), (3, 3), (4, 6), (15, 7), (16, 11)):
        levels = np.zeros(1, np.int64)
        levels[0] = value
        assert qsgd.elias_bits(levels) == 1 + bits + 1  # its distance 1, itself, its sign


def test_entropy_is_that_of_the_histogram():
    assert qsgd.entropy_bits(np.array([0, 0, 1, -1])) == pytest.approx(6)


def test_half_precision_and_bytes_are_nearly_exact(normal):
    ((bits, nmse),) = plain.fp16(normal)
    assert (bits, nmse < 1e-6) == (16, True)
    ((bits, nmse),) = plain.int8_zstd(normal, [normal.size])
    assert bits < 8
    assert nmse == pytest.approx((float(np.abs(normal).max()) / 127) ** 2 / 12, rel=0.05)


def test_the_scalar_quantizers_theory_matches_the_published_figures():
    curve = list(ecsq.gaussian())
    for bits, nmse in ((0.1, 0.909), (0.5, 0.617), (1, 0.348), (2, 0.0889), (4, 0.0056)):
        assert points.at(curve, bits) == pytest.approx(nmse, rel=0.01)
        assert points.needed(curve, nmse) == pytest.approx(bits, abs=0.01)
    # Gish and Pierce: at high rates a quarter of a bit, half of log2(pi e / 6), above the rate-distortion function.
    assert points.needed(curve, 2**-10) - 5 == pytest.approx(math.log2(math.pi * math.e / 6) / 2, abs=0.002)


def test_an_envelope_keeps_the_best_settings():
    assert points.envelope([(1, 0.5), (2, 0.6), (3, 0.1), (2, 0.4), (0, 1.0)]) == [(0, 1.0), (1, 0.5), (3, 0.1)]
    assert points.envelope([(0, 1.0), (1, 0.5), (2, 0.0)]) == [(0, 1.0), (1, 0.5), (2, 0.0)]


def test_between_points_the_logarithm_is_linear_and_beyond_them_there_is_nothing():
    curve = [(1.0, 0.1), (3.0, 0.001)]
    assert points.at(curve, 2.0) == pytest.approx(0.01)
    assert points.needed(curve, 0.01) == pytest.approx(2.0)
    assert points.at(curve, 0.9) is points.at(curve, 3.1) is points.at([], 1.0) is None
    assert points.needed(curve, 0.2) is points.needed(curve, 1e-4) is None
