import numpy as np
import pytest
import torch

from broker_server.aggregation.krum import Attackers, fewest, krum, multi_krum
from edge_client.errors import TrainingError
from tests.broker_server.aggregation.stacked import Stacked


def test_by_hand():
    # f = 1 of 5: the score is the sum of squares to the 2 closest. Around 2 it is 1 + 1, around 1 and 3 it is 1 + 4.
    rows = [[1], [2], [3], [5], [90]]
    assert krum(0.2).finish(Stacked.of(rows)).tolist() == [2.0]
    # The best two: 2 (2), then 1 and 3 (5 each), of which the first came first.
    assert multi_krum(0.2, keep=2).finish(Stacked.of(rows)).tolist() == [1.5]
    # All but the one that may be an attacker's: 5 has 4 + 9.
    assert multi_krum(0.2).finish(Stacked.of(rows)).tolist() == [(1 + 2 + 3 + 5) / 4]


def reference(rows: torch.Tensor, attackers: int, keep: int) -> torch.Tensor:
    """Blanchard et al., section 4, with distances by difference."""
    scores = []
    for number in range(len(rows)):
        others = torch.cat([rows[:number], rows[number + 1 :]])
        squares = ((others - rows[number]) ** 2).sum(dim=1)
        scores.append(squares.sort().values[: len(rows) - attackers - 2].sum())
    return rows[torch.stack(scores).argsort()[:keep]].mean(dim=0)


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_is_the_paper_s(keep):
    rows = np.random.default_rng(1703).normal(3, 1, (12, 300)).astype(np.float32)
    expected = reference(torch.from_numpy(rows).double(), 3, keep).float().numpy()
    found = multi_krum(0.25, keep).finish(Stacked.of(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if keep == 1:
        assert krum(0.25).finish(Stacked.of(rows)).tobytes() == found.tobytes()
        assert any(found.tobytes() == row.tobytes() for row in rows), "Krum is one of the updates, bit for bit"


def test_the_fewest_updates():
    assert [fewest(Attackers(attackers=share)) for share in (0.0, 0.2, 0.4)] == [3, 3, 11]
    for share in (0.1, 0.25, 0.33, 0.4, 0.45):
        least = fewest(Attackers(attackers=share))
        assert all(count >= 2 * int(share * count) + 3 for count in range(least, 200))
        assert least == 3 or least - 1 < 2 * int(share * (least - 1)) + 3
    with pytest.raises(TrainingError, match=r"10 updates came; the aggregation needs 11: set round\.minimum"):
        krum(0.4).finish(Stacked.of(np.zeros((10, 2))))
