"""Updates, and their partial sums."""

import numpy as np

from broker_server.aggregation.streaming import PartialSum
from broker_server.aggregation.weighting import Report
from edge_client.wire.messages import RECEIVED_LOSS

SEED = 20170217


def updates(count: int = 5, size: int = 40_000) -> list[tuple[np.ndarray, Report]]:
    rng = np.random.default_rng(SEED)
    entries = []
    for _ in range(count):
        samples = int(rng.integers(1, 900))
        scalars = {"steps": float(rng.integers(1, 90)), RECEIVED_LOSS: float(rng.uniform(0.1, 3))}
        report = Report("a", samples, scalars, weight=float(samples))
        entries.append((rng.standard_normal(size, dtype=np.float32), report))
    return entries


def total(rule, entries) -> PartialSum:
    state = rule.init(entries[0][0].size)
    for update, report in entries:
        state = rule.add(state, update, report)
    return state
