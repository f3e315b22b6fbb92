"""What clients are asked to tell of the model and of their data: the settings, and what becomes of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from broker_server.sections import Count, Duration, Positive, Seconds
from edge_client.codec.layout import Layout
from edge_client.errors import ConfigError
from edge_client.manifest import Manifest
from edge_client.reporting import CONFUSION, FEATURES, LABELS, MOST_CLASSES, classes, floats, report_layouts, sharing
from edge_client.wire.messages import ReportPlan

if TYPE_CHECKING:
    from broker_server.config import Federation  # which has its settings checked here

Bound = Annotated[float, Meta(ge=-1e30, le=1e30)]


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[evaluation]``: where and how often the global model is measured."""

    every: Count = 1
    """Rounds between evaluations; 0 means never."""
    clients: Count = 0
    """Clients asked to evaluate; 0 means none."""
    data: str = ""
    """An npz file for the server's held-out evaluation; empty means none."""
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 256
    deadline: Seconds = 300.0
    confusion: bool = False
    """Clients also count, for each class of their test data, what the model takes it for."""
    period: Duration = 0.0
    """With ``round.mode = "evaluation"``, seconds from one evaluation to the next; 0 is one evaluation, and the end."""


class Analytics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[analytics]``: what is asked, in evaluations, of the data of those clients whose owners share it."""

    labels: bool = False
    """How many samples of each class they train on."""
    features: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Bins of a histogram of each input; 0 asks for none."""
    range: tuple[Bound, Bound] = (0.0, 1.0)
    """Where the bins begin and end, in what the model sees: pixels that are scaled on the device are from 0 to 1."""
    least: Positive = 10
    """Sums over fewer clients than this are not kept, nor confusion: they would tell of single ones."""


def report_plan(federation: "Federation") -> ReportPlan:
    """What an invitation asks for."""
    asked = federation.analytics
    return ReportPlan(federation.evaluation.confusion, asked.labels, asked.features, *asked.range)


def report_vectors(federation: "Federation", manifest: Manifest) -> dict[str, Layout]:
    """The vectors that clients may send in evaluations, all of what the settings ask for.

    Raises:
        ConfigError: the bundle has no such thing.
    """
    found = report_layouts(manifest, report_plan(federation))
    if missing := [(key, name) for key, name in _asked(federation).items() if name not in found]:
        scored = classes(manifest)
        possible = []
        if scored is not None and scored.count <= MOST_CLASSES:
            possible += ["evaluation.confusion", "analytics.labels"]
        if floats(manifest):
            possible.append("analytics.features")
        scores = f"one target of classes, one output with a score for each, at most {MOST_CLASSES}, and sum.correct"
        need = "an input of floats" if missing[0][1] == FEATURES else scores
        raise ConfigError(
            f"{missing[0][0]} needs {need}, and bundle {manifest.name!r} has none; possible with it: "
            f"{', '.join(possible) or 'none of them'}, and the metrics {', '.join(('loss', *manifest.metrics))}"
        )
    return found


def check_analytics(federation: "Federation") -> None:
    """Refuse what could never be told.

    Raises:
        ConfigError: nobody is asked, too few are, or never; or the range is empty.
    """
    evaluation, asked, alone = federation.evaluation, federation.analytics, federation.round.mode == "evaluation"
    if asked.range[0] >= asked.range[1]:
        raise ConfigError(f"analytics.range is {list(asked.range)}; expected [lowest, highest]")
    for key in _asked(federation):
        if not (evaluation.every or alone):
            raise ConfigError(f"{key} is asked for and evaluation.every is 0: set it above 0")
        if evaluation.clients < asked.least:
            raise ConfigError(
                f"{key} is asked of evaluation.clients, {evaluation.clients}; expected at least {asked.least} clients, "
                "for sums over fewer than analytics.least are not kept"
            )
    if alone and not (evaluation.clients or evaluation.data or federation.simulation.test_fraction):
        raise ConfigError('round.mode is "evaluation" and nobody evaluates; set evaluation.clients or evaluation.data')
    try:
        sharing(federation.simulation.share)
    except ConfigError as error:
        raise ConfigError(f"simulation.{error}") from error


def _asked(federation: "Federation") -> Mapping[str, str]:
    """What the settings ask for: by key, the name of the vector."""
    wanted = {
        "evaluation.confusion": (federation.evaluation.confusion, CONFUSION),
        "analytics.labels": (federation.analytics.labels, LABELS),
        "analytics.features": (federation.analytics.features, FEATURES),
    }
    return {key: name for key, (asked, name) in wanted.items() if asked}
