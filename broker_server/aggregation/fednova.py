"""FedNova: the mean of updates over the length of the training that made them (Wang et al. 2020, arXiv 2007.07481).

Clients that make more steps pull the mean of FedAvg to their own optimum. With ``tau_k`` how far client ``k``'s steps
go (`LocalTraining.distance`), the aggregate is

    tau_eff * sum(p_k * update_k / tau_k),    tau_eff = sum(p_k * tau_k)

so each counts by its direction, and the step is as long as FedAvg's would be on even steps.
"""

from broker_server.aggregation.algorithm import Algorithm
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.streaming import Aggregator, Share, weighted_sum
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector


def fednova(local: LocalTraining) -> Aggregator:
    """The normalized mean; updates report the ``steps`` that they took, 1 or more.

    Raises:
        ConfigError: what clients train with cannot be normalized.
    """
    local.distance(1)

    def share(update: Vector, report: Report) -> Share:
        del update
        distance = local.distance(max(1.0, report.scalars["steps"]))
        weight = report.weight
        return Share(weight * report.scale / distance, (weight, weight * distance))

    def divisor(sums: tuple[float, ...]) -> float:
        weights, distances = sums
        return weights * weights / distances if distances > 0 else 0.0

    return weighted_sum(share, divisor)


ALGORITHM = Algorithm(make=lambda options, local: fednova(local), needs=("steps",), buffered=True)
