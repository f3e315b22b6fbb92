"""FedNova: the mean of updates over the length of the training that made them (Wang et al. 2020, arXiv 2007.07481).

Clients that make more steps pull the mean of FedAvg to their own optimum. With ``tau_k`` how far client ``k``'s steps
go (`LocalTraining.distance`), the aggregate is

    tau_eff * sum(p_k * update_k / tau_k),    tau_eff = sum(p_k * tau_k)

so each counts by its direction, and the step is as long as FedAvg's would be on even steps.

Steps are those that led to what was sent: fewer than were made, where a client stopped early and sent the best model.
An update without any counts as one step that led nowhere.
"""

from broker_server.aggregation.algorithm import Algorithm
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.streaming import Aggregator, Share, weighted_sum
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector
from edge_client.errors import ConfigError
from edge_client.wire.messages import DISTANCE

_LEAST = 0.1
"""The least mean of a schedule's factors that is believed: what a client says must not make its update any longer."""


def fednova(local: LocalTraining) -> Aggregator:
    """The normalized mean; updates report the ``steps`` that they took, 1 or more.

    Where the learning rate falls within a task, they also report the ``distance``, the sum of their learning rates:
    over the first one it is the length for plain SGD. That of momentum depends on the order of the rates.

    Raises:
        ConfigError: what clients train with cannot be normalized.
    """
    local.distance(1)
    _check_rates(local)

    def share(update: Vector, report: Report) -> Share:
        del update
        steps = max(1.0, report.scalars["steps"])
        distance = local.distance(steps)
        if local.falls and report.scalars["steps"] >= 1:
            # Clients that say nothing of it are older, and know of no rate that falls.
            told = report.scalars.get(DISTANCE, steps * local.learning_rate) / local.learning_rate
            distance = min(max(told, _LEAST * steps), steps)
        weight = report.weight
        return Share(weight * report.scale / distance, (weight, weight * distance))

    def divisor(sums: tuple[float, ...]) -> float:
        weights, distances = sums
        return weights * weights / distances if distances > 0 else 0.0

    return weighted_sum(share, divisor)


def _check_rates(local: LocalTraining) -> None:
    falls = 'fednova cannot be combined with a train.schedule that is not "constant"'
    if local.falls:
        local.rate("fednova")
    if local.falls and local.optimizer != "sgd":
        raise ConfigError(
            f'{falls} where the bundle\'s optimizer is {local.optimizer!r}; expected "sgd", or a constant schedule'
        )
    if local.falls and local.proximal:
        raise ConfigError(
            f"{falls} and a proximal term, train.hypers.mu = {local.proximal:g}; expected 0, or a constant schedule"
        )
    if local.falls and local.decays:
        raise ConfigError(f"{falls} and a train.decay; expected one of them")
    if local.decays and local.proximal:
        raise ConfigError(
            f"fednova cannot be combined with a train.decay and a proximal term, train.hypers.mu = {local.proximal:g}; "
            "expected one of them"
        )


ALGORITHM = Algorithm(make=lambda options, local: fednova(local), needs=("steps",), buffered=True)
