"""What ``[aggregation]`` and ``[server]`` come to: a rule, what each update counts, and the server's optimizer."""

import msgspec

from broker_server.aggregation import registry
from broker_server.aggregation.algorithm import Algorithm, Everyone
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.optimizer import ServerOptimizer, chain, scale_by
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.variates import Variates
from broker_server.aggregation.weighting import Stage, bounded, by_client, by_samples, discounted, uniform
from broker_server.aggregation.weighting import chain as stages
from broker_server.config import Federation
from edge_client.errors import ConfigError
from edge_client.manifest import Manifest

_ENDLESS = 10_000
"""Rounds that are looked at where nothing ends them."""


def aggregator(settings: Federation, manifest: Manifest) -> Aggregator | CohortAggregator:
    """How updates become one.

    Raises:
        ConfigError: the algorithm cannot be combined with how the bundle trains.
    """
    chosen = registry.algorithm(settings.aggregation.algorithm)
    _check_exported(settings, chosen, manifest)
    return chosen.make(_options(settings, chosen), _local(settings, manifest))


def variates(settings: Federation) -> Variates | None:
    """What the server keeps of clients' control variates, where they have any."""
    chosen = registry.algorithm(settings.aggregation.algorithm)
    return None if chosen.variates is None else chosen.variates(_options(settings, chosen))


def needs(settings: Federation, manifest: Manifest) -> dict[str, float]:
    """The scalars without which an update is refused, and the lowest value of each."""
    chosen = registry.algorithm(settings.aggregation.algorithm)
    least = chosen.least(_local(settings, manifest))
    if (decay := settings.train.decay).changes:
        falls = decay.over(settings.stop.rounds)
        lowest = min(falls(before) for before in range(settings.stop.rounds or _ENDLESS))
        least = {name: lowest * value for name, value in least.items()}
    return {name: least.get(name, 0.0) for name in chosen.needs}


def _local(settings: Federation, manifest: Manifest) -> LocalTraining:
    train = settings.train
    return LocalTraining.of(manifest, train.hypers, falls=train.schedule != "constant", decays=train.decay.changes)


def _options(settings: Federation, chosen: Algorithm) -> msgspec.Struct:
    options = registry.options(chosen.options, settings.aggregation.options, "aggregation.options")
    if isinstance(options, Everyone) and not options.clients:
        return msgspec.structs.replace(options, clients=settings.simulation.clients)
    return options


def _check_exported(settings: Federation, chosen: Algorithm, manifest: Manifest) -> None:
    there = {"control": manifest.control, "proximal": manifest.proximal}
    missing = [f"--{name}" for name in chosen.exported if not there[name]]
    if missing:
        raise ConfigError(
            f'aggregation.algorithm = "{settings.aggregation.algorithm}" cannot be had with bundle {manifest.name!r}, '
            f"which was exported without {' and '.join(missing)}; export it with, or choose another algorithm"
        )


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
