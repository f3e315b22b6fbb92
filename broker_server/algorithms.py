"""What ``[aggregation]`` and ``[server]`` come to: a rule, what each update counts, and the server's optimizer."""

from broker_server.aggregation import registry
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.optimizer import ServerOptimizer, chain, scale_by
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.weighting import Stage, bounded, by_client, by_samples, discounted, uniform
from broker_server.aggregation.weighting import chain as stages
from broker_server.config import Federation
from edge_client.manifest import Manifest


def aggregator(settings: Federation, manifest: Manifest) -> Aggregator | CohortAggregator:
    """How updates become one.

    Raises:
        ConfigError: the algorithm cannot be combined with how the bundle trains.
    """
    section = settings.aggregation
    chosen = registry.algorithm(section.algorithm)
    options = registry.options(chosen.options, section.options, "aggregation.options")
    train = settings.train
    local = LocalTraining.of(manifest, train.hypers, falls=train.schedule != "constant", decays=train.decay.changes)
    return chosen.make(options, local)


def stage(settings: Federation) -> Stage:
    """What an update counts."""
    section = settings.aggregation
    found: list[Stage] = [by_samples if section.weights == "samples" else uniform]
    if section.clients:
        found.append(by_client(section.clients))
    if settings.round.mode == "buffered":
        found.append(discounted(settings.round.staleness))
    if section.norm:
        found.append(bounded(section.norm))
    return stages(*found)


def server_optimizer(settings: Federation) -> ServerOptimizer:
    """How the model moves along what updates became."""
    section = settings.server
    chosen = registry.optimizer(section.optimizer)
    rate = section.learning_rate or chosen.learning_rate
    factor = section.schedule.over(settings.stop.rounds)
    own = chosen.make(registry.options(chosen.options, section.options, "server.options"))
    return chain(own, scale_by(lambda count: rate * factor(count)))
