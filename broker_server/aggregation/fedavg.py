"""FedAvg: the mean by weights (McMahan et al. 2017, "Communication-efficient learning of deep networks...")."""

from broker_server.aggregation.algorithm import Algorithm
from broker_server.aggregation.streaming import Aggregator, Share, weighted_sum


def fedavg() -> Aggregator:
    """``sum(p_k * update_k)`` with ``p_k = w_k / sum(w)``."""
    return weighted_sum(lambda _, report: Share(report.weight * report.scale, (report.weight,)), lambda sums: sums[0])


ALGORITHM = Algorithm(make=lambda options, local: fedavg(), mean=True, buffered=True)
