"""The runs of a sweep: names, settings, seeds, all of them checked before the first one starts."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec

from broker_server.algorithms import aggregator
from broker_server.analytics import report_vectors
from broker_server.config import Federation, load
from broker_server.personal import check_personal
from broker_server.server import check_names, read_bundle
from broker_server.sweep.contents import Contents
from broker_server.sweep.settings_file import differing
from edge_client.bundle import Bundle
from edge_client.errors import ConfigError, FedgeError

_OWN = {
    "federation.seed": "each run has its seed: name them in seeds",
    "federation.state": "each run has a state folder of its own",
    "broker.port": "each run has a broker of its own, on a free port",
    "broker.url": "each run has a broker of its own",
}
"""Settings that a sweep makes itself, and why."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]{0,149}")


@dataclass(frozen=True)
class Run:
    """One simulation of a sweep."""

    name: str
    """Its folder's, unique in the sweep: letters, digits, and ``_.,=+-``."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Dotted keys (``train.hypers.lr``) and values; they replace what the federation file says."""
    seed: int = 0
    variant: str = ""
    """The name that it has in common with runs of other settings and seeds, such as that of an algorithm."""


_Bundles = dict[tuple[str, tuple[str, ...]], Bundle]
"""What clients would get, by the file's digest and the patterns of what stays on them."""


@dataclass(frozen=True)
class Planned:
    """A run whose settings are checked."""

    run: Run
    federation: Federation
    """Everything that the run is started with, its place for state excepted."""
    fingerprint: str
    """SHA-256 of all that its result depends on: settings, bundle, data, seed, the version of fedge."""


def plan(file: Path, runs: Iterable[Run], overrides: Mapping[str, object] | None = None) -> tuple[Planned, ...]:
    """Check all runs, in order.

    Args:
        file: the federation file.
        runs: what is to run.
        overrides: settings for every run.

    Raises:
        ConfigError: a name is no name or used twice, or a setting cannot be used; the message says of which run.
        FedgeError: the bundle or the data cannot be used.
    """
    planned: list[Planned] = []
    names: dict[str, str] = {}
    contents, bundles = Contents(), _Bundles()
    for run in runs:
        if not _NAME.fullmatch(run.name):
            raise ConfigError(
                f"run {run.name!r}: expected a name of up to 150 letters, digits, and _.,=+-, a letter or digit first"
            )
        # Names are folders, and not every file system tells capitals from small letters.
        if other := names.get(run.name.casefold()):
            raise ConfigError(f"runs {other} and {run.name} have the same name; give each its own")
        names[run.name.casefold()] = run.name
        try:
            planned.append(_planned(file, run, overrides or {}, contents, bundles))
        except FedgeError as error:
            raise type(error)(f"run {run.name}: {error}") from error
    return tuple(planned)


def _planned(file: Path, run: Run, overrides: Mapping[str, object], contents: Contents, bundles: _Bundles) -> Planned:
    for key in overrides:
        if key in run.settings:
            raise ConfigError(f"{key} is set for all runs, and by this one to {run.settings[key]!r}; set it once")
    settings = {**overrides, **run.settings}
    for key, reason in _OWN.items():
        if key in settings:
            raise ConfigError(f"{key} cannot be set in a sweep: {reason}")
    federation = load(file, {**settings, "federation.seed": run.seed, "broker.port": 0})
    if federation.broker.url:
        raise ConfigError(f"{file}: broker.url is {federation.broker.url}; remove it: {_OWN['broker.url']}")
    if not federation.simulation.data:
        raise ConfigError(f"{file}: simulation.data is empty; expected an .npz file or module:function")
    digest = contents.digest(Path(federation.federation.bundle))
    clients = digest, federation.personal.patterns
    if clients not in bundles:
        bundles[clients] = Bundle.from_bytes(read_bundle(federation))
    _check_bundle(federation, bundles[clients])
    return Planned(run, federation, _fingerprint(federation, digest, contents))


def _check_bundle(federation: Federation, bundle: Bundle) -> None:
    """What a server would refuse as it starts."""
    check_names(federation, bundle)
    check_personal(federation, bundle)
    aggregator(federation, bundle.manifest)
    report_vectors(federation, bundle.manifest)


def _fingerprint(settings: Federation, bundle: str, contents: Contents) -> str:
    # Where things lie changes no result; what they hold does.
    tree = differing(
        msgspec.structs.replace(
            settings,
            federation=msgspec.structs.replace(settings.federation, bundle=bundle, state=""),
            evaluation=msgspec.structs.replace(settings.evaluation, data=contents.of(settings.evaluation.data)),
            simulation=msgspec.structs.replace(settings.simulation, data=contents.of(settings.simulation.data)),
        )
    )
    own = [contents.of(name) for name in (settings.aggregation.algorithm, settings.server.optimizer) if ":" in name]
    known = json.dumps([tree, own, version("fedge")], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()
