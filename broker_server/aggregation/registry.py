"""All that ``[aggregation]`` and ``[server]`` can name, in two tables: an algorithm is one file, and one line here.

Algorithms of one's own need no line: ``module:attribute`` names an `Algorithm` or an `Optimizer` in a module of the
working directory or an installed one.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from broker_server.aggregation import fedavg, feddyn, fednova, geometric_median, krum, median, qfedavg, scaffold
from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.optimizer import ServerOptimizer, adaptive, trace
from broker_server.validation import check_keys
from edge_client.errors import ConfigError

ALGORITHMS: Mapping[str, Algorithm] = {
    "fedavg": fedavg.ALGORITHM,
    "fednova": fednova.ALGORITHM,
    "qfedavg": qfedavg.ALGORITHM,
    "scaffold": scaffold.ALGORITHM,
    "feddyn": feddyn.ALGORITHM,
    "median": median.MEDIAN,
    "trimmed-mean": median.TRIMMED_MEAN,
    "krum": krum.KRUM,
    "multi-krum": krum.MULTI_KRUM,
    "geometric-median": geometric_median.ALGORITHM,
}
"""``[aggregation] algorithm``."""


class Momentum(Options, frozen=True):
    """``momentum`` 0 is FedAvg, above it FedAvgM."""

    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0


class Adaptive(Options, frozen=True):
    """The names and defaults of Reddi et al. 2021."""

    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Meta(gt=0, le=1)] = 1e-3


class Adagrad(Options, frozen=True):
    """As `Adaptive`; squares are added up, not averaged."""

    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    tau: Annotated[float, Meta(gt=0, le=1)] = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How the server moves along an aggregate, before its learning rate."""

    make: Callable[[Any], ServerOptimizer]
    """``make(options)``; ``options`` is an ``options``."""
    options: type[msgspec.Struct] = Options
    """What ``[server.options]`` may say, with its defaults."""
    learning_rate: float = 1.0
    """Where ``[server]`` has none."""


OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer(make=lambda options: trace(options.momentum), options=Momentum),
    "adam": Optimizer(
        make=lambda options: adaptive("adam", options.beta1, options.beta2, options.tau),
        options=Adaptive,
        learning_rate=0.01,
    ),
    "yogi": Optimizer(
        make=lambda options: adaptive("yogi", options.beta1, options.beta2, options.tau),
        options=Adaptive,
        learning_rate=0.01,
    ),
    "adagrad": Optimizer(
        make=lambda options: adaptive("adagrad", options.beta1, 0.0, options.tau), options=Adagrad, learning_rate=0.01
    ),
}
"""``[server] optimizer``: FedAvg and FedAvgM, FedAdam, FedYogi, FedAdagrad."""

Entry = TypeVar("Entry", Algorithm, Optimizer)
Given = TypeVar("Given", bound=msgspec.Struct)


def algorithm(name: str) -> Algorithm:
    """What ``aggregation.algorithm`` names.

    Raises:
        ConfigError: nothing of that name; the message lists what there is.
    """
    return _find(name, ALGORITHMS, Algorithm, "aggregation.algorithm")


def optimizer(name: str) -> Optimizer:
    """What ``server.optimizer`` names.

    Raises:
        ConfigError: nothing of that name; the message lists what there is.
    """
    return _find(name, OPTIMIZERS, Optimizer, "server.optimizer")


def options(kind: type[Given], given: Mapping[str, object], key: str) -> Given:
    """The options that the section ``key`` gives, as what they are for.

    Raises:
        ConfigError: one is unknown, of the wrong type or out of range.
    """
    check_keys(given, kind, f"{key}.")
    return msgspec.convert(given, kind)


def _find(name: str, table: Mapping[str, Entry], kind: type[Entry], key: str) -> Entry:
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    known = ", ".join(f'"{one}"' for one in table)
    if not colon:
        raise ConfigError(f'{key} is "{name}"; expected one of {known}, or module:attribute for one of your own')
    # A console script does not search the working directory, where a user's module lies.
    sys.path.insert(0, os.getcwd())
    try:
        found: object = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f'{key} is "{name}": {type(error).__name__}: {error}; expected one of {known}, or module:attribute'
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(found, kind):
        raise ConfigError(f'{key} is "{name}", which is a {type(found).__name__}; expected a {kind.__name__}')
    return found
