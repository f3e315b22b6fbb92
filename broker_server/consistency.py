"""Settings that are fine alone and impossible together."""

from typing import TYPE_CHECKING

from edge_client.codec.update import TARGETS
from edge_client.errors import ConfigError

if TYPE_CHECKING:
    from broker_server.config import Codec, Federation, Round  # which has its settings checked here

_SYNCHRONOUS = ("cohort", "over_select", "minimum")
_BUFFERED = ("concurrency", "buffer", "staleness", "max_staleness")
"""Keys of ``[round]`` that only one of its modes reads."""
VALUES = {"nmse": 0.1, "cohort": 2.0}
"""By target of the codec, the value that it has where none is set."""
_HIGHEST = TARGETS | {"cohort": 1000.0}


def check_together(federation: "Federation") -> None:
    """Refuse settings that are fine alone and impossible together.

    Raises:
        ConfigError: these are, and the message says which.
    """
    rounds, stop, simulation = federation.round, federation.stop, federation.simulation
    for name in ("bundle", "state"):
        if not getattr(federation.federation, name):
            raise ConfigError(f"federation.{name} is empty; expected a path")
    _check_mode(rounds)
    if federation.broker.password_file and not federation.broker.username:
        raise ConfigError("broker.password_file is set without broker.username; set both or none")
    _check_rates(federation.codec)
    if simulation.speed[0] > simulation.speed[1]:
        raise ConfigError(f"simulation.speed is {list(simulation.speed)}; expected [slowest, fastest]")
    if simulation.data:
        asked = "cohort" if rounds.mode == "synchronous" else "concurrency"
        for key, wanted in ((asked, getattr(rounds, asked)), ("clients", rounds.clients)):
            if wanted > simulation.clients:
                raise ConfigError(
                    f"round.{key} is {wanted}; expected at most simulation.clients, {simulation.clients}: "
                    "there are no more phones to ask"
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
