"""What changes while a broker runs: who is enrolled, and who is revoked."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from broker_server.broker_config import emqx, mosquitto, nats
from broker_server.broker_config.programs import hang_up
from broker_server.broker_config.spec import BrokerSpec, known, recall
from edge_client.errors import ConfigError


def reload(folder: Path, *, devices: Iterable[str] = (), revoked: Iterable[str] = ()) -> str:
    """Write a broker's folder anew, and let mosquitto read it, if it runs on this machine; says what is left to do.

    mosquitto lets no revoked certificate in again, but keeps the connections that it has (2.0.11, and 2.1 says nothing
    else): a rule for the revoked device takes all it may read and write at once.

    Args:
        folder: one that `write` made.
        devices: all that have a valid certificate.
        revoked: all that had one, and have none now.

    Raises:
        ConfigError: the folder was not written by ``fedge broker config``, or cannot be written.
    """
    kept = recall(folder)
    spec = dataclasses.replace(kept.spec, devices=tuple(devices), revoked=tuple(revoked))
    configuration = _write(folder, kept.kind, spec, kept.settings)
    place = spec.at(folder)
    if kept.kind == "mosquitto" and hang_up(place / "mosquitto.pid", place / configuration.name):
        return f"{folder}: mosquitto reads its rules again"
    how = {"mosquitto": "send it SIGHUP", "nats": "start it anew", "emqx": "emqx ctl conf reload"}[kept.kind]
    return f"{folder}: written; copy it to where {kept.kind} runs, if that is not here, and {how}"


def reload_all(authority: Path, *, devices: Iterable[str] = (), revoked: Iterable[str] = ()) -> list[str]:
    """`reload` for every folder that was written for an authority and is still there.

    Raises:
        ConfigError: as there, once it was tried with all folders.
    """
    devices, revoked = tuple(devices), tuple(revoked)
    lines, failures = [], []
    for folder in known(authority):
        try:
            lines.append(reload(folder, devices=devices, revoked=revoked))
        except ConfigError as error:
            failures.append(str(error))
    if failures:
        raise ConfigError("; ".join(failures))
    return lines


def mute(authority: Path, muted: tuple[str, ...]) -> None:
    """Have every mosquitto of an authority that runs on this machine take nothing from these devices, and no others.

    Other brokers go on as they are: their rules cannot be changed while they run, or not from here.

    Raises:
        ConfigError: as `reload`.
    """
    for folder in known(authority):
        kept = recall(folder)
        if kept.kind == "mosquitto" and kept.spec.muted != muted:
            spec = dataclasses.replace(kept.spec, muted=muted)
            place = spec.at(folder)
            hang_up(place / "mosquitto.pid", place / _write(folder, kept.kind, spec, kept.settings).name)


def _write(folder: Path, kind: str, spec: BrokerSpec, settings: dict[str, str | int]) -> Path:
    if kind == "mosquitto":
        dialect: mosquitto.Dialect = "2.1" if settings["dialect"] == "2.1" else "2.0"
        return mosquitto.write(folder, spec, dialect, str(settings["plugin"]))
    if kind == "nats":
        return nats.write(folder, spec, int(settings["client_port"]))
    return emqx.write(folder, spec)
