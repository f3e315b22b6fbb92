import numpy as np
import pytest

from broker_server.aggregation.weighting import (
    Report,
    bounded,
    by_client,
    by_samples,
    chain,
    discounted,
    square_norm,
    uniform,
)
from edge_client.errors import TrainingError

UPDATE = np.float32([3, -4])  # of length 5


def test_weights_by_samples_and_alike():
    assert by_samples(Report(samples=30), UPDATE).weight == 30.0
    assert uniform(Report(samples=30), UPDATE).weight == 1.0
    with pytest.raises(TrainingError, match="-1 samples"):
        by_samples(Report(samples=-1), UPDATE)


def test_the_first_pattern_that_fits_a_client_holds():
    stage = chain(by_samples, by_client({"pi-7": 3.0, "pi-*": 0.5}))
    assert [stage(Report(client, 10), UPDATE).weight for client in ("pi-7", "pi-8", "phone")] == [30.0, 5.0, 10.0]


def test_age_shortens_and_does_not_weigh():
    stage = chain(by_samples, discounted(0.5))
    assert [stage(Report(age=age), UPDATE).scale for age in (0, 3)] == [1.0, 0.5]
    assert stage(Report(samples=8, age=3), UPDATE).weight == 8.0


def test_norms_are_bounded():
    assert bounded(1.0)(Report(), UPDATE).scale == pytest.approx(0.2)
    assert bounded(5.0)(Report(), UPDATE).scale == 1.0
    assert bounded(6.0)(Report(), UPDATE).scale == 1.0
    assert bounded(1.0)(Report(), np.zeros(2, np.float32)).scale == 1.0


def test_what_is_shortened_already_is_bounded_as_it_is():
    assert chain(discounted(1.0), bounded(2.0))(Report(age=1), UPDATE).scale == pytest.approx(0.4)
    assert chain(discounted(1.0), bounded(3.0))(Report(age=1), UPDATE).scale == 0.5


def test_norms_are_added_in_float64():
    vector = np.full(200_000, 1e-3, np.float32)
    assert square_norm(vector) == pytest.approx(vector.size * float(np.float32(1e-3)) ** 2, rel=1e-12)
    assert square_norm(np.float32([1e25])) == pytest.approx(1e50)
