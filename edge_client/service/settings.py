"""A device's configuration file, ``/etc/fedge/device.toml``: what `fedge join` would be told on its command line, and
what only a service needs.
"""

from pathlib import Path
from typing import Any

import click
import msgspec

from edge_client.errors import ConfigError
from edge_client.feeds.drop import Retention
from edge_client.reporting import sharing
from edge_client.service.gate import ALWAYS, Gate, Rules

_DAY = 86_400.0


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where samples come from, and how long they stay."""

    source: str = ""
    """``drop:FOLDER``, ``ring:FOLDER``, or what ``fedge join --data`` takes."""
    quiet: float = 5.0
    """Seconds for which a file in a drop directory must not have changed."""
    keep_mib: int = 0
    """MiB that a drop directory may hold before the oldest files go; 0 removes none."""
    keep_days: float = 0.0
    """Age in days at which files go, and at which recorded samples are not used any more; 0 is never."""
    memory_mib: int = 32
    """MiB of samples in memory at a time."""

    @property
    def retention(self) -> Retention:
        """What is removed from a drop directory."""
        return Retention(self.keep_mib << 20, self.keep_days * _DAY)


class DeviceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"client": "id"}):
    """The whole file. What is not given is as on the command line."""

    broker: str | None = None
    client: str | None = None
    federation: str | None = None
    state: str | None = None
    identity: str | None = None
    holdout: float | None = None
    share: str | None = None
    """What it tells of its data in evaluations where it is asked: ``labels``, ``features``, both with a comma between
    them, or ``nothing``."""
    threads: int | None = None
    spin: bool | None = None
    uplink: float | None = None
    memory_limit: int | None = None
    insecure: bool | None = None
    stall: float = 900.0
    """Seconds without a training step after which a busy client counts as hanging, and is restarted by systemd."""
    model_minutes: float = 60.0
    """Minutes for which a version of the model for other programs stays at least: it is written in full."""
    releases: str = "/opt/fedge"
    """Where clients are installed that the server may replace, where `deploy.update` does it."""
    data: DataSettings = DataSettings()
    training: Rules = Rules()

    @classmethod
    def load(cls, path: Path) -> "DeviceSettings":
        """Read a file.

        Raises:
            ConfigError: it cannot be read, or a setting is unknown, of the wrong type or out of range.
        """
        try:
            found = msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; name a device's configuration file") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}; see README, A fleet of Raspberry Pis") from error
        try:
            Gate(found.training)
            sharing(found.share or "")
            data = found.data
            if (
                min(data.quiet, data.keep_mib, data.keep_days, found.stall, found.model_minutes) < 0
                or data.memory_mib < 1
            ):
                raise ConfigError("[data], stall and model_minutes: expected 0 or more, and a memory_mib of at least 1")
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return found

    def options(self) -> dict[str, Any]:
        """What it says of the command line's options, by their names in the program."""
        names = ("client", "federation", "state", "identity", "holdout", "share", "threads", "spin", "uplink")
        found = {"url": self.broker, "data": self.data.source or None, "insecure": self.insecure}
        found |= {name: getattr(self, name) for name in (*names, "memory_limit")}
        return {name: value for name, value in found.items() if value is not None}


def _configured(context: click.Context, _: click.Parameter, path: Path | None) -> DeviceSettings:
    if path is None:
        return DeviceSettings(training=ALWAYS, model_minutes=0.0)
    settings = DeviceSettings.load(path)
    context.default_map = dict(context.default_map or {}) | settings.options()
    return settings


CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=None,
    is_eager=True,
    callback=_configured,
    help="A file with these settings, and when to train; what is said here counts more.",
)
