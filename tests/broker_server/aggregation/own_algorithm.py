"""Clients on which the model is worse count more: the README's example of an algorithm of one's own."""

from typing import Annotated

from msgspec import Meta

from broker_server.aggregation.algorithm import Algorithm, Options
from broker_server.aggregation.streaming import Share, weighted_sum


class Power(Options, frozen=True):
    """What [aggregation.options] may say."""

    power: Annotated[float, Meta(ge=0, le=4)] = 1.0


def by_loss(power):
    """The mean by weights times the reported training loss to this power."""

    def share(update, report):
        weight = report.weight * report.scalars["loss"] ** power
        return Share(factor=weight * report.scale, sums=(weight,))

    return weighted_sum(share, divisor=lambda sums: sums[0])


BY_LOSS = Algorithm(
    make=lambda options, local: by_loss(options.power),
    options=Power,
    needs=("loss",),  # an update that does not say it is refused
    buffered=True,  # it goes without rounds, too
)
