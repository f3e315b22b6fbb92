"""Trials of the learning benchmark: each a whole federation on mosquitto in a process of its own, run once and kept."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests import datasets
from tests.bench.federations import BUILD, FEDGE, PIXELS, ROOT, BenchError, command, write_json

HONEST = "edge_client.emulator"
"""The module that runs as the phones' process."""
MODELS: Mapping[str, tuple[str, ...]] = {
    "2nn": ("export.models.mcmahan:mnist_2nn",),
    "cnn": ("export.models.mcmahan:mnist_cnn",),
}
"""Factories of the models on images of 28 x 28; a name may go on with ``+proximal`` and ``+control``."""
Settings = Mapping[str, object]
"""Dotted keys of the federation file."""
Result = dict[str, Any]
"""What a trial came to: ``rounds`` as of the ledger, ``stamps`` (seconds from the start to each), ``bytes_up``,
``bytes_down``, ``seconds`` and the ``trial`` itself."""


@dataclass(frozen=True)
class Trial:
    """One federation, from an untrained model to its end."""

    name: str
    """Its file's, and so one of its own."""
    model: str
    data: str
    """A data set of tests/datasets.py: phones share its training part, the server measures on its test part."""
    settings: Settings
    fleet: str = HONEST
    variables: Mapping[str, str] = field(default_factory=dict)
    """Added to its environment."""
    final: Settings = field(default_factory=dict)
    """Other settings for one round more, where any are given."""
    exact: bool = True
    """Whether each round must count as many updates as were asked for."""

    @property
    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


class Bench:
    """Runs trials, ``jobs`` at once, and keeps what they came to: a benchmark that was broken off goes on from there."""

    def __init__(self, folder: Path = BUILD / "bench" / "learning", jobs: int = 0, timeout: float = 7200.0) -> None:
        self.folder = folder
        self.jobs = jobs or os.cpu_count() or 1
        self.timeout = timeout

    def run(self, trials: Sequence[Trial], jobs: int = 0) -> dict[str, Result]:
        """What each trial came to, by name; those that were run before with the same settings are not run again.

        Raises:
            BenchError: one failed, after the others have ended.
        """
        found = {trial.name: self._kept(trial) for trial in trials}
        missing = [trial for trial in trials if found[trial.name] is None]
        for model in {trial.model for trial in missing}:
            self.bundle(model)
        for name in {trial.data for trial in missing}:
            datasets.LOADERS[name]().write(BUILD / "data" / name)
        asyncio.run(self._all(missing, jobs or self.jobs))
        results = {trial.name: self._kept(trial) for trial in trials}
        return {name: result for name, result in results.items() if result is not None}

    def bundle(self, model: str) -> Path:
        """A model's bundle, exported once: runs of before keep their meaning."""
        path = self.folder / "bundles" / f"{model}.fedge"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            name, *options = model.split("+")
            command(
                [str(FEDGE), "export", *MODELS[name], *PIXELS, *(f"--{option}" for option in options)]
                + ["--loss", "cross_entropy", "--optimizer", "sgd", "-o", str(path)],
                path.with_suffix(".txt"),
                variables=_searched(),
            )
        return path

    def _kept(self, trial: Trial) -> Result | None:
        path = self._path(trial)
        if not path.exists():
            return None
        result: Result = json.loads(path.read_text())
        return result if result["trial"] == trial.written else None

    def _path(self, trial: Trial) -> Path:
        return self.folder / "runs" / f"{trial.name}.json"

    async def _all(self, trials: Sequence[Trial], jobs: int) -> None:
        free = asyncio.Semaphore(jobs)

        async def one(trial: Trial) -> None:
            async with free:
                await self._one(trial)

        ended = await asyncio.gather(*map(one, trials), return_exceptions=True)
        for failure in ended:
            if isinstance(failure, BaseException):
                raise failure

    async def _one(self, trial: Trial) -> None:
        path = self._path(trial)
        folder = path.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        data = BUILD / "data" / trial.data
        paths = {
            "bundle": str(self.bundle(trial.model)),
            "train": str(data / "train.npz"),
            "test": str(data / "test.npz"),
        }
        write_json(folder / "trial.json", {"trial": trial.written, **paths})
        with (folder / "log.txt").open("wb") as log:
            # A session of its own: what it started ends with it, also when it is stuck.
            process = await asyncio.create_subprocess_exec(
                *(
                    sys.executable,
                    "-m",
                    "tests.bench.learning.run",
                    str(folder / "trial.json"),
                    str(folder / "out.json"),
                ),
                cwd=folder,
                env=os.environ | _searched() | dict(trial.variables),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                await asyncio.wait_for(process.wait(), self.timeout)
                ending = f"ended with status {process.returncode}"
            except TimeoutError:
                ending = f"took more than {self.timeout:.0f} s"
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
        if process.returncode:
            last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise BenchError(f"{trial.name} {ending}: {''.join(last)} (all it said: {folder / 'log.txt'})")
        result: Result = json.loads((folder / "out.json").read_text())
        wanted = trial.settings["round.cohort"] if trial.exact else None
        short = [row["round"] for row in result["rounds"] if wanted is not None and row["clients"] != wanted]
        if short:
            raise BenchError(f"{trial.name}: rounds {short} counted other than {wanted} updates: not a fair trial")
        write_json(path, {"trial": trial.written, **result})
        shutil.rmtree(folder)
        print(f"{trial.name}: {len(result['rounds'])} rounds in {result['seconds']:.0f} s", flush=True)


def _searched() -> dict[str, str]:
    """So that programs in any folder find this tree's modules."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
