"""The sub-command for brokers: `fedge broker config`."""

import os
import pwd
import time
from pathlib import Path
from typing import Literal

import click

from broker_server.broker_config import emqx, mosquitto, nats
from broker_server.broker_config.spec import BrokerSpec
from broker_server.config import Federation, load
from edge_client.errors import ConfigError

Kind = Literal["mosquitto", "nats", "emqx"]
_START = {"mosquitto": "mosquitto -c {}", "nats": "nats-server -c {}", "emqx": "add {} to emqx.conf"}
_SERVICE = "mosquitto"
"""The user that packages of mosquitto make, and that it becomes when root starts it."""


@click.group()
def broker() -> None:
    """Configure a broker of your own for a federation."""


@broker.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--for", "kind", type=click.Choice(["mosquitto", "nats", "emqx"]), required=True, help="Which broker.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address that the broker listens on.")  # noqa: S104
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="Port for MQTT over TLS.")
@click.option("--dialect", type=click.Choice(["2.0", "2.1"]), default=None, help="mosquitto's.  [default: installed]")
@click.option("--plugin", default="", help="mosquitto 2.1's mosquitto_acl_file.so.  [default: where packages put it]")
@click.option("--device", "devices", multiple=True, help="NATS: a device that will enrol.")
@click.option("--at", "place", default="", help="Where the folder will lie on the broker's machine.  [default: here]")
@click.option("--user", default=None, help="Who the broker runs as.  [default: mosquitto where you are root, else you]")
def config(
    file: Path,
    kind: Kind,
    output: Path,
    host: str,
    port: int,
    dialect: mosquitto.Dialect | None,
    plugin: str,
    devices: tuple[str, ...],
    place: str,
    user: str | None,
) -> None:
    """Write a folder with which a broker serves a federation, over TLS, to nobody without a certificate.

    FILE is the federation's TOML file, whose trust.authority names the authority's folder. The folder has the
    configuration, the access rules, and what the broker needs of the authority: copy it to the broker's machine as it
    is. `fedge revoke` writes it anew.
    """
    settings = load(file)
    if dialect is not None and kind != "mosquitto":
        raise ConfigError(f"--dialect {dialect} is mosquitto's; remove it for --for {kind}")
    authority = _authority(settings, file)
    enrolled, revoked = _standing(authority)
    spec = BrokerSpec(
        settings.federation.name,
        authority,
        host=host,
        port=port,
        place=place,
        user=_service(kind) if user is None else user,
        devices=enrolled,
        revoked=revoked,
        expected=devices,
    )
    if kind == "mosquitto":
        written = mosquitto.write(output, spec, dialect, plugin)
    else:
        written = nats.write(output, spec) if kind == "nats" else emqx.write(output, spec)
    click.echo(f"{written}: {_START[kind].format(spec.at(output) / written.name)}", err=True)


def _authority(settings: Federation, file: Path) -> Path:
    if not settings.trust.authority:
        raise ConfigError(
            f"{file}: trust.authority is empty; make an authority with `fedge ca init -o authority` and name it there"
        )
    return Path(settings.trust.authority)


def _standing(authority: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of devices that are enrolled, and of those that were; none where the registry is elsewhere."""
    from broker_server.authority import REGISTRY
    from broker_server.registry import standing

    return standing(authority / REGISTRY, time.time())


def _service(kind: Kind) -> str:
    if kind != "mosquitto" or os.geteuid() != 0:
        return ""
    try:
        return pwd.getpwnam(_SERVICE).pw_name
    except KeyError:
        return ""
