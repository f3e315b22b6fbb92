"""Settings that are fine alone and impossible together."""

from typing import TYPE_CHECKING

from broker_server.aggregation import registry
from broker_server.aggregation.algorithm import Everyone
from broker_server.aggregation.schedules import SPANNING
from broker_server.analytics import check_analytics
from broker_server.metrics import BY_CLIENTS
from edge_client.codec.update import TARGETS
from edge_client.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker_server.aggregation.algorithm import Algorithm
    from broker_server.config import Codec, Federation, Round  # which has its settings checked here

_SYNCHRONOUS = ("cohort", "over_select", "minimum")
_OWN = ("ditto", "fine-tune")
_BUFFERED = ("concurrency", "buffer", "staleness", "max_staleness")
"""Keys of ``[round]`` that only one of its modes reads."""
VALUES = {"nmse": 0.1, "cohort": 2.0}
"""By target of the codec, the value that it has where none is set."""
_HIGHEST = TARGETS | {"cohort": 1000.0}
_FINE = {"nmse": 0.01, "step": 0.35}
"""By target of the codec, the highest value at which most elements are told, and not left out as too small: of 15
updates of Laplacian elements the median was 4 % (energy) apart from that of exact ones, at an nmse of 0.1 35 %."""


def check_together(federation: "Federation") -> None:
    """Refuse settings that are fine alone and impossible together.

    Raises:
        ConfigError: these are, and the message says which.
    """
    rounds, stop, simulation = federation.round, federation.stop, federation.simulation
    for name in ("bundle", "state"):
        if not getattr(federation.federation, name):
            raise ConfigError(f"federation.{name} is empty; expected a path")
    if rounds.mode != "evaluation":
        _check_mode(rounds)
    check_analytics(federation)
    if federation.broker.password_file and not federation.broker.username:
        raise ConfigError("broker.password_file is set without broker.username; set both or none")
    _check_rates(federation.codec)
    _check_train(federation)
    _check_algorithm(federation)
    _check_server(federation)
    _check_personal(federation)
    if simulation.speed[0] > simulation.speed[1]:
        raise ConfigError(f"simulation.speed is {list(simulation.speed)}; expected [slowest, fastest]")
    if simulation.data:
        asked = {"synchronous": "cohort", "buffered": "concurrency", "evaluation": "clients"}[rounds.mode]
        for key in (asked, "clients"):
            if (wanted := getattr(rounds, key)) > simulation.clients:
                raise ConfigError(
                    f"round.{key} is {wanted}; expected at most simulation.clients, {simulation.clients}: "
                    "there are no more phones to ask"
                )
        if rounds.mode == "evaluation" and not rounds.clients and federation.evaluation.clients > simulation.clients:
            raise ConfigError(
                f"evaluation.clients is {federation.evaluation.clients}; expected at most simulation.clients, "
                f"{simulation.clients}, or round.clients, how many to wait for: there are no more phones to ask"
            )
        if simulation.split == "natural" and not simulation.key:
            raise ConfigError('simulation.key is empty; expected the npz key of the user for split = "natural"')
    evaluation = federation.evaluation
    measured = evaluation.every and (evaluation.data or evaluation.clients or simulation.test_fraction)
    if (stop.target is not None or stop.patience) and not measured:
        raise ConfigError(
            "stop.target and stop.patience need an evaluation and there is none; "
            "set evaluation.data or evaluation.clients, and evaluation.every above 0"
        )
    if (stop.target is not None or stop.patience) and stop.metric.startswith(BY_CLIENTS) and not evaluation.clients:
        raise ConfigError(
            f"stop.metric is {stop.metric!r}, which clients measure, and none are asked to; set evaluation.clients"
        )


def _check_train(federation: "Federation") -> None:
    train, rounds, stop = federation.train, federation.round, federation.stop
    if bool(train.validation) != bool(train.patience):
        set_, missing = ("validation", "patience") if train.validation else ("patience", "validation")
        raise ConfigError(
            f"train.{set_} is set without train.{missing}; expected both, as validation = 0.2 and patience = 3, or none"
        )
    if train.seconds >= rounds.deadline and rounds.mode == "synchronous":
        raise ConfigError(
            f"train.seconds is {train.seconds:g}; expected less than round.deadline, {rounds.deadline:g}, "
            "which also holds the transfers"
        )
    falls = train.decay
    if falls.changes and "lr" not in train.hypers:
        raise ConfigError("train.decay is set without train.hypers.lr; expected the learning rate that it falls from")
    if falls.kind not in SPANNING:
        return
    if not (falls.rounds or stop.rounds):
        raise ConfigError(
            f'train.decay.rounds is 0 and so is stop.rounds; expected one of them with kind = "{falls.kind}"'
        )
    if falls.rounds and not falls.least and not 0 < stop.rounds <= falls.rounds:
        raise ConfigError(
            f"train.decay.least is 0 and train.decay.rounds {falls.rounds}: nothing would be learned in later rounds; "
            "expected stop.rounds up to that, or a least above 0"
        )


def _check_algorithm(federation: "Federation") -> None:
    section, rounds, codec = federation.aggregation, federation.round, federation.codec
    chosen = registry.algorithm(section.algorithm)
    options = registry.options(chosen.options, section.options, "aggregation.options")
    name = f'aggregation.algorithm = "{section.algorithm}"'
    if rounds.mode == "buffered" and not chosen.buffered:
        raise ConfigError(
            f'{name} cannot be combined with round.mode = "buffered": its updates are of one version; '
            f"expected {_those(lambda one: one.buffered)}, or synchronous rounds"
        )
    if rounds.mode == "synchronous" and rounds.minimum < (fewest := chosen.fewest(options)):
        raise ConfigError(f"round.minimum is {rounds.minimum}; expected at least {fewest}, which {name} needs")
    if codec.target == "cohort" and not chosen.mean:
        raise ConfigError(
            f'{name} cannot be combined with codec.target = "cohort", which plans the noise of a mean by weights; '
            f"expected {_those(lambda one: one.mean)}, or another target"
        )
    if codec.target == "cohort" and section.clients:
        raise ConfigError(
            'aggregation.clients cannot be combined with codec.target = "cohort", which knows clients\' weights by '
            "aggregation.weights alone; use another target"
        )
    if chosen.variates is not None:
        _check_variates(federation, name, options)
    if chosen.every_element and codec.kind == "quantized":
        _check_fine(name, codec)


def _check_variates(federation: "Federation", name: str, options: object) -> None:
    """What devices remember, and what the server knows of it, have to stay one."""
    section, rounds, codec = federation.aggregation, federation.round, federation.codec
    if isinstance(options, Everyone):
        everyone = options.clients or (federation.simulation.clients if federation.simulation.data else 0)
        if everyone < rounds.cohort:
            found = f"is {everyone}" if everyone else "is missing"
            raise ConfigError(
                f"aggregation.options.clients {found}; expected how many clients there are in all, at least "
                f"round.cohort, {rounds.cohort}, for {name}"
            )
    if section.norm:
        raise ConfigError(
            f"{name} cannot be combined with aggregation.norm: a client remembers all of an update that the server "
            "shortens; limits.norm refuses it, and then the client does not"
        )
    if codec.kind == "quantized" and codec.feedback != "residual":
        raise ConfigError(
            f'{name} cannot be combined with codec.feedback = "{codec.feedback}": what clients remember of updates '
            'and what the server has of them would drift apart; expected "residual", or codec.kind = "none"'
        )
    chosen = registry.algorithm(section.algorithm)
    if chosen.method == "scaffold" and federation.train.patience:
        raise ConfigError(
            f"{name} cannot be combined with train.patience: a client whose best model is the one that it received has "
            "made no step to tell its gradient by; remove train.patience and train.validation"
        )
    for key, value in chosen.hypers(options).items():
        if federation.train.hypers.get(key, value) != value:
            raise ConfigError(
                f"train.hypers.{key} is {federation.train.hypers[key]:g}; {name} sets it to {value:g}: remove it"
            )


def _check_fine(name: str, codec: "Codec") -> None:
    """Where most elements of an update are left out as too small, the middle one of all clients' is zero."""
    most = _FINE.get(codec.target, 0.0)
    values = (codec.value or VALUES.get(codec.target, 0.0), *codec.clients.values())
    if not max(values) <= most or codec.upload_seconds:
        found = "codec.upload_seconds" if max(values) <= most else f'codec.target = "{codec.target}" at {max(values):g}'
        allowed = " or ".join(f'codec.target = "{target}" with a value up to {fine}' for target, fine in _FINE.items())
        raise ConfigError(
            f"{name} cannot be combined with {found}, which leaves most elements out: their median is 0; expected "
            f'codec.kind = "none", or {allowed}; or {_those(lambda one: not one.every_element)}'
        )


def _those(fits: "Callable[[Algorithm], bool]") -> str:
    return " or ".join(f'"{name}"' for name, one in registry.ALGORITHMS.items() if fits(one))


def _check_server(federation: "Federation") -> None:
    section, falls = federation.server, federation.server.schedule
    registry.options(registry.optimizer(section.optimizer).options, section.options, "server.options")
    if falls.kind in SPANNING and not (falls.rounds or federation.stop.rounds):
        raise ConfigError(
            f'server.schedule.rounds is 0 and so is stop.rounds; expected one of them with kind = "{falls.kind}"'
        )


def _check_personal(federation: "Federation") -> None:
    section, plain = federation.personal, type(federation.personal)()
    if "" in section.patterns:
        raise ConfigError("personal.layers holds an empty pattern; expected names such as head.*, or norm")
    if section.patterns and section.method == "ditto":
        raise ConfigError(
            'personal.layers cannot be combined with personal.method = "ditto", whose model is personal as a whole; '
            "remove one of them"
        )
    of = {"pull": ("lambda", ("ditto",)), "epochs": ("epochs", _OWN), "steps": ("steps", _OWN)}
    for key, (name, methods) in of.items():
        if (found := getattr(section, key)) != getattr(plain, key) and section.method not in methods:
            expected = " or ".join(f'"{method}"' for method in methods)
            raise ConfigError(
                f'personal.{name} is {found} and means nothing with personal.method = "{section.method}"; '
                f"remove it, or set personal.method to {expected}"
            )
    if "mu" in section.hypers and section.method == "ditto":
        raise ConfigError("personal.hypers.mu is what personal.lambda sets with ditto; set that")
    if section.patterns:
        check_no_whole_model(federation, "personal.layers")


def check_no_whole_model(federation: "Federation", why: str) -> None:
    """Refuse what needs the whole model on the server, where some of it stays on the clients.

    Raises:
        ConfigError: ``why``, for what is set.
    """
    for key, found in {
        "evaluation.data": federation.evaluation.data,
        "simulation.test_fraction": federation.simulation.test_fraction,
    }.items():
        if found:
            raise ConfigError(
                f"{key} cannot be combined with {why}: the server has no whole model to evaluate; "
                "remove it, and set evaluation.clients, who evaluate theirs (in a simulation with simulation.holdout)"
            )


def _check_mode(rounds: "Round") -> None:
    others = _BUFFERED if rounds.mode == "synchronous" else _SYNCHRONOUS
    defaults = type(rounds)()
    for key in others:
        if (found := getattr(rounds, key)) != getattr(defaults, key):
            right = "buffered" if rounds.mode == "synchronous" else "synchronous"
            raise ConfigError(
                f'round.{key} is {found} and means nothing with round.mode = "{rounds.mode}"; '
                f'remove it, or set round.mode = "{right}"'
            )
    if rounds.mode == "buffered":
        return
    if rounds.minimum > rounds.cohort:
        raise ConfigError(f"round.minimum is {rounds.minimum}; expected at most round.cohort, {rounds.cohort}")
    if rounds.quorum < rounds.minimum:
        raise ConfigError(f"round.clients is {rounds.clients}; expected at least round.minimum, {rounds.minimum}")


def _check_rates(codec: "Codec") -> None:
    most = _HIGHEST[codec.target]
    if codec.value is None and codec.target not in VALUES:
        raise ConfigError(
            f'codec.value is missing; expected a number of {codec.target} with codec.target = "{codec.target}"'
        )
    for key, value in {
        "value": codec.value,
        **{f"clients.{name}": rate for name, rate in codec.clients.items()},
    }.items():
        if value is not None and value > most:
            raise ConfigError(f'codec.{key} is {value}; expected at most {most:g} with codec.target = "{codec.target}"')
