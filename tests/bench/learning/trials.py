"""Trials of the learning benchmark: each a whole federation on mosquitto, a run of a sweep, kept once it is done."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from broker_server.sweep.running import run_all
from broker_server.sweep.runs import Run
from tests import datasets
from tests.bench.federations import BUILD, FEDGE, PIXELS, ROOT, ROUNDS, BenchError, command, write_json

HONEST = "edge_client.emulator"
"""The module that runs as the phones' process."""
MODELS: Mapping[str, str] = {
    "2nn": "export.models.mcmahan:mnist_2nn",
    "cnn": "export.models.mcmahan:mnist_cnn",
    "mlp": "tests.bench.learning.models:perceptron",
    "mlp-norm": "tests.bench.learning.models:normalized",
}
"""Factories of the models on images of 28 x 28; a name may go on with ``+proximal`` and ``+control``."""
Settings = Mapping[str, object]
"""Dotted keys of the federation file."""
Result = dict[str, Any]
"""What a trial came to: ``rounds`` as of the ledger, ``stamps`` (seconds from the start to the end of each),
``bytes_up``, ``bytes_down`` and ``seconds``."""


@dataclass(frozen=True)
class Trial:
    """One federation, from an untrained model to its end."""

    name: str
    """Of its own in its part."""
    model: str
    data: str
    """A data set of tests/datasets.py: phones share its training part, the server measures on its test part."""
    settings: Settings
    seed: int = 0
    fleet: str = HONEST
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the fleet's environment."""
    final: Settings = field(default_factory=dict)
    """Other settings for one round more, where any are given."""
    exact: bool = True
    """Whether each round must count as many updates as were asked for."""

    @property
    def beside(self) -> dict[str, Any]:
        """What a run of it needs to know that its federation file does not say."""
        return {"fleet": self.fleet, "variables": dict(self.variables), "final": dict(self.final)}


class Bench:
    """Runs a part's trials, ``jobs`` at once, and keeps what they came to: broken off, it goes on from there."""

    def __init__(self, part: str, jobs: int = 0) -> None:
        self.folder = BUILD / "bench" / "learning"
        self.part = part
        self.jobs = jobs or os.cpu_count() or 1

    def run(self, trials: Sequence[Trial], jobs: int = 0) -> dict[str, Result]:
        """What each trial came to, by name; those that were run before with the same settings are not run again.

        Raises:
            BenchError: one failed, after the others have ended, or its rounds were not what was asked for.
        """
        folder = self.folder / self.part
        by_name = {trial.name: trial for trial in trials}
        for trial in trials:
            _forget_others(folder / "runs" / trial.name / "result.json", trial)
        file = folder / "federation.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('[federation]\nname = "bench"\nbundle = ""\n[broker]\nkind = "mosquitto"\n')
        runs = [self._run(trial) for trial in trials]
        log = partial(print, flush=True)
        found = run_all(
            file, runs, folder, jobs=jobs or self.jobs, log=log, command=lambda *paths: _command(by_name, *paths)
        )
        if failed := [name for name in by_name if name not in found]:
            raise BenchError(f"{len(failed)} trials failed: {', '.join(failed)} (what they said: {folder / 'runs'})")
        for name, trial in by_name.items():
            _check(trial, found[name])
        return found

    def bundle(self, model: str) -> Path:
        """A model's bundle, exported once: runs of before keep their meaning."""
        path = self.folder / "bundles" / f"{model}.fedge"
        if not path.exists():
            name, *options = model.split("+")
            flags = [f"--{option}" for option in options]
            command(
                [str(FEDGE), "export", MODELS[name], *PIXELS, *flags, "--loss", "cross_entropy", "-o", str(path)],
                path.with_suffix(".txt"),
                variables={"PYTHONPATH": str(ROOT)},
            )
        return path

    def data(self, name: str) -> tuple[Path, Path]:
        """A data set's ``train.npz`` and ``test.npz``."""
        folder = BUILD / "data" / name
        if not (folder / "test.npz").exists():
            datasets.LOADERS[name]().write(folder)
        return folder / "train.npz", folder / "test.npz"

    def _run(self, trial: Trial) -> Run:
        train, test = self.data(trial.data)
        settings: dict[str, object] = {
            "federation.bundle": str(self.bundle(trial.model)),
            "simulation.data": str(train),
            "evaluation.data": str(test),
            **trial.settings,
        }
        if ROUNDS:
            settings["stop.rounds"] = ROUNDS
        return Run(trial.name, settings, trial.seed)


def accuracy(result: Result) -> list[float]:
    """On the test set, round by round."""
    return [row["metrics"]["accuracy"] for row in result["rounds"]]


def traffic(result: Result) -> list[int]:
    """Bytes up and down until each round's end, without the first round's, in which phones get the bundle."""
    total, found = 0, []
    for row in result["rounds"]:
        total += (row["bytes_up"] + row["bytes_down"]) * bool(found)
        found.append(total)
    return found


def _command(trials: Mapping[str, Trial], file: Path, out: Path) -> Sequence[str]:
    """The program that runs the trial of this federation file."""
    beside = file.with_name("beside.json")
    write_json(beside, trials[file.parent.name].beside)
    return [sys.executable, "-m", "tests.bench.learning.run", str(file), str(beside), str(out)]


def _forget_others(path: Path, trial: Trial) -> None:
    """Forget a result of the same name that was made with other phones."""
    if path.exists() and json.loads(path.read_text()).get("beside") != json.loads(json.dumps(trial.beside)):
        path.unlink()


def _check(trial: Trial, result: Result) -> None:
    wanted = trial.settings.get("round.cohort")
    # What is learned in the round that clients evaluate after is not looked at.
    rows = result["rounds"][:-1] if trial.final else result["rounds"]
    short = [row["round"] for row in rows if trial.exact and row["clients"] != wanted]
    if short:
        raise BenchError(f"{trial.name}: rounds {short} counted other than {wanted} updates: not a fair trial")
