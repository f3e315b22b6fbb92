"""An aggregation algorithm as the registry knows it: how it is made, what it asks for, and what it goes with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.variates import Variates


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what ``[aggregation.options]`` and ``[server.options]`` may say: nothing."""


class Everyone(Options, frozen=True):
    """``clients``: how many there are in all; 0 is those of ``[simulation]``."""

    clients: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """How the updates of a task become one."""

    make: Callable[[Any, LocalTraining], Aggregator | CohortAggregator]
    """``make(options, local)``: the aggregator; ``options`` is an ``options``.

    Raises:
        ConfigError: it cannot be had with what clients train with.
    """
    options: type[msgspec.Struct] = Options
    """What ``[aggregation.options]`` may say, with its defaults."""
    needs: tuple[str, ...] = ()
    """Scalars without which an update is refused."""
    least: Callable[[LocalTraining], Mapping[str, float]] = lambda _: {}
    """``least(local)``: the lowest value above 0 that training can come to, of some of them."""
    mean: bool = False
    """The aggregate is a mean by the weights of ``[aggregation]``, so that what its noise comes to can be planned."""
    buffered: bool = False
    """Updates may be of different versions."""
    every_element: bool = False
    """Each element is judged by itself: those that an update leaves out count as zeros."""
    fewest: Callable[[Any], int] = lambda _: 1
    """``fewest(options)``: the fewest updates that it works with."""
    method: Literal["sgd", "scaffold", "feddyn"] = "sgd"
    """How clients train: `TrainPlan.method`."""
    exported: tuple[Literal["control", "proximal"], ...] = ()
    """What its method needs the bundle to be exported with."""
    hypers: Callable[[Any], Mapping[str, float]] = lambda _: {}
    """``hypers(options)``: hyperparameters that its method fixes."""
    variates: Callable[[Any], Variates] | None = None
    """``variates(options)``: what the server keeps for its method."""
