"""The sweep file: values crossed with each other, with alternatives that have values of their own, and with seeds."""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_server.sweep.runs import Run
from edge_client.errors import ConfigError

_KEYS = ("seeds", "grid", "runs")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,49}")
_LONGEST = 32


@dataclass(frozen=True)
class Variant:
    """One alternative, such as an algorithm."""

    name: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What it sets, by dotted key."""
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Values that are tried with it alone; what it sets or tries replaces what is tried with all."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says."""

    seeds: tuple[int, ...] | None = None
    """None is the federation file's own."""
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)
    variants: tuple[Variant, ...] = (Variant(),)


def expand(sweep: Sweep, seed: int = 0) -> tuple[Run, ...]:
    """All runs: variants, in each the values crossed (the last key changes fastest), for each the seeds.

    A run's name says what it is (``fedprox-mu=0.1-seed=2``) and hangs on nothing but its own variant, values and seed,
    and on the keys that the sweep tries. ``seed`` is for sweeps that name none.
    """
    grids = [_grid(sweep, variant) for variant in sweep.variants]
    called = short_names([key for grid in grids for key in grid])
    runs = []
    for variant, grid in zip(sweep.variants, grids, strict=True):
        for values in itertools.product(*grid.values()):
            tried = dict(zip(grid, values, strict=True))
            parts = [variant.name] if variant.name else []
            parts += [f"{called[key]}={_text(value)}" for key, value in tried.items()]
            runs += [
                Run("-".join([*parts, f"seed={number}"]), {**variant.settings, **tried}, number, variant.name)
                for number in sweep.seeds or (seed,)
            ]
    return tuple(runs)


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: it cannot be read, has an unknown key, or something in it is not what it must be.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a sweep file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    try:
        return _sweep(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """What dotted keys are called in few words: their last part, where that says which is meant."""
    known = dict.fromkeys(keys)
    last = [key.rpartition(".")[2] for key in known]
    return {key: end if last.count(end) == 1 else key for key, end in zip(known, last, strict=True)}


def _sweep(tree: Mapping[str, Any]) -> Sweep:
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{key} is not a known key; known here: {', '.join(_KEYS)}")
    seeds, runs = tree.get("seeds"), tree.get("runs", [{}])
    if seeds is not None and not _are_seeds(seeds):
        raise ConfigError(f"seeds is {seeds!r}; expected a list of different whole numbers from 0, such as [0, 1, 2]")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError("runs is not a list of sections; expected [[runs]] with a name and settings, once for each")
    variants = tuple(_variant(run, named="runs" in tree) for run in runs)
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f'two of [[runs]] have the name "{twice[0]}"; give each its own')
    return Sweep(None if seeds is None else tuple(seeds), _values(tree.get("grid", {}), "grid"), variants)


def _variant(run: Mapping[str, Any], *, named: bool) -> Variant:
    name = run.get("name", "")
    if named and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f'name of [[runs]] is {name!r}; expected up to 50 letters, digits, and _.+, such as "fedavg"')
    settings = {key: value for key, value in run.items() if key not in ("name", "grid")}
    return Variant(name, _flat(settings), _values(run.get("grid", {}), f"grid of run {name}"))


def _values(table: object, where: str) -> dict[str, Sequence[object]]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is {table!r}; expected a section of settings, each with a list of values")
    flat = _flat(table)
    for key, values in flat.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key} is {values!r}; expected a list of the values to try")
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
            raise ConfigError(f"{where}: {key} is {values!r}; expected each value once")
    return flat


def _are_seeds(seeds: object) -> bool:
    return (
        isinstance(seeds, list)
        and bool(seeds)
        and all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
        and len(set(seeds)) == len(seeds)
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections by dotted key: ``train.hypers.lr`` means the same in quotes, without, and below a section's head."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _grid(sweep: Sweep, variant: Variant) -> dict[str, Sequence[object]]:
    shared = {key: values for key, values in sweep.grid.items() if key not in variant.settings}
    return {**shared, **variant.grid}


def _text(value: object) -> str:
    plain = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))
    text = re.sub(r"[^A-Za-z0-9_.,+-]", "_", plain)[:_LONGEST]
    # Two values must not become one name.
    return text if text == plain else f"{text}_{hashlib.sha256(plain.encode()).hexdigest()[:6]}"
