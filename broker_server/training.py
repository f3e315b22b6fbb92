"""What clients do with a task: what ``[train]`` says of it, as their invitations say it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from broker_server.aggregation import registry
from broker_server.aggregation.schedules import schedule
from broker_server.analytics import report_plan
from broker_server.personal import personal_plan
from broker_server.sections import Count, Duration, Positive, Word
from edge_client.errors import ConfigError
from edge_client.manifest import Manifest
from edge_client.wire.messages import RECEIVED_LOSS, TrainPlan

if TYPE_CHECKING:
    from broker_server.config import Federation  # whose section is here

_AS_TIME_ALLOWS = 10_000
_EXPORTED_FOR = {"max_norm": "--clip", "mu": "--proximal", "momentum": "--optimizer momentum"}
"""Hyperparameters that a bundle has only where it was asked for them, by what asks."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[server.schedule]`` and ``[train.decay]``: a learning rate over the rounds (`aggregation.schedules`)."""

    kind: Literal["constant", "step", "exponential", "linear", "cosine"] = "constant"
    warmup: Count = 0
    """Rounds in which it rises."""
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.5
    every: Positive = 10
    """With step and exponential it falls by ``factor`` in so many rounds."""
    rounds: Count = 0
    """With linear and cosine it falls until then; 0 is ``stop.rounds``."""
    least: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """With linear and cosine, the share of it that stays."""

    @property
    def changes(self) -> bool:
        """Whether it is ever another than 1."""
        return self.kind != "constant" or self.warmup > 0

    def over(self, rounds: int) -> Callable[[int], float]:
        """What the rate is multiplied by, from how many rounds there were before, of ``rounds`` in all."""
        return schedule(
            self.kind,
            warmup=self.warmup,
            factor=self.factor,
            every=self.every,
            rounds=self.rounds or rounds,
            least=self.least,
        )


class Train(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train]``: what a client does with a task. ``steps`` above 0 replaces ``epochs``."""

    epochs: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """Unless given 1, or where ``seconds`` are, as many as there is time for."""
    steps: Count = 0
    seconds: Duration = 0.0
    """Training ends with the first step after so many seconds, and counts as whole; 0 is no bound."""
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 32
    hypers: dict[Word, Annotated[float, Meta(ge=-1e9, le=1e9)]] = {}
    """Values for the bundle's scalar inputs, such as ``lr``; the manifest's defaults hold for the others."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from step to step within a task, and starts anew with each."""
    decay: Schedule = Schedule()
    """How the learning rate that tasks start with falls from round to round."""
    validation: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of its training data that a client keeps aside, always the same."""
    patience: Annotated[int, Meta(ge=0, le=10_000)] = 0
    """Epochs in a row without a better loss on what is kept aside that end training; the best model is what counts."""


def train_plan(settings: "Federation", version: int, run: int = 0) -> TrainPlan:
    """The plan of a task that makes this version (from 1); what an algorithm asks of clients is here.

    ``run`` as in `TrainPlan`.
    """
    train, section = settings.train, settings.aggregation
    chosen = registry.algorithm(section.algorithm)
    fixed = chosen.hypers(registry.options(chosen.options, section.options, "aggregation.options"))
    hypers = {**train.hypers, **fixed}
    if train.decay.changes:
        hypers["lr"] *= train.decay.over(settings.stop.rounds)(version - 1)
    return TrainPlan(
        epochs=train.epochs or (_AS_TIME_ALLOWS if train.seconds else 1),
        steps=train.steps,
        batch_size=train.batch_size,
        hypers=hypers,
        measure=RECEIVED_LOSS in chosen.needs,
        method=chosen.method,
        seconds=train.seconds,
        schedule=train.schedule,
        validation=train.validation,
        patience=train.patience,
        run=run,
        personal=personal_plan(settings.personal),
        report=report_plan(settings),
    )


def check_hypers(settings: "Federation", manifest: Manifest) -> None:
    """Find what the bundle has not got, before every client declines every task for it.

    Raises:
        ConfigError: ``train.hypers`` names an unknown one, or there is no learning rate that could fall.
    """
    known, train = manifest.defaults(), settings.train
    have = f"known there: {', '.join(sorted(known))}"
    for name in train.hypers:
        if name not in known:
            asks = f", or export it with {_EXPORTED_FOR[name]}" if name in _EXPORTED_FOR else ""
            raise ConfigError(f"train.hypers.{name} is not a hyperparameter of bundle {manifest.name!r}; {have}{asks}")
    if train.schedule != "constant" and "lr" not in known:
        raise ConfigError(f'train.schedule is "{train.schedule}" and bundle {manifest.name!r} has no lr; {have}')
