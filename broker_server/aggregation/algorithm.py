"""An aggregation algorithm as the registry knows it: how it is made, what it asks for, and what it goes with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.local import LocalTraining
from broker_server.aggregation.streaming import Aggregator


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what ``[aggregation.options]`` and ``[server.options]`` may say: nothing."""


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
    mean: bool = False
    """The aggregate is a mean by the weights of ``[aggregation]``, so that what its noise comes to can be planned."""
    buffered: bool = False
    """Updates may be of different versions."""
    every_element: bool = False
    """Each element is judged by itself: those that an update leaves out count as zeros."""
    fewest: Callable[[Any], int] = lambda _: 1
    """``fewest(options)``: the fewest updates that it works with."""
