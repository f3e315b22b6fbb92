"""Runs of a sweep in processes of their own, several at once; what is done is not done again."""

import asyncio
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from broker_server.database import Lock
from broker_server.sweep.runs import Planned, Run, plan
from broker_server.sweep.settings_file import settings_file
from edge_client.errors import ConfigError, FedgeError, LedgerError

Result = dict[str, Any]
"""What ``fedge simulate --json`` writes (`broker_server.cli.results`), and ``run``: name, variant, seed, settings and
fingerprint."""
Command = Callable[[Path, Path], Sequence[str]]
"""The program that simulates the federation of the first file and writes its result to the second."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 8.0
"""What a run gets to end after it was asked to."""


def simulation(file: Path, result: Path) -> Sequence[str]:
    """``fedge simulate`` for one run."""
    entry = "from edge_client.cli import main; main()"
    return [sys.executable, "-P", "-c", entry, "simulate", str(file), "--json", str(result)]


def default_jobs() -> int:
    """Runs at once unless something else is asked for: half the cores, as each has a server and phones."""
    return max(1, (os.cpu_count() or 1) // 2)


def run_all(
    file: Path,
    runs: Iterable[Run],
    folder: Path,
    *,
    jobs: int = 0,
    log: Callable[[str], None] = print,
    overrides: Mapping[str, object] | None = None,
    keep: bool = False,
    command: Command = simulation,
) -> dict[str, Result]:
    """Check all runs, then run those whose results are not there; SIGINT and SIGTERM end it and leave what is done.

    Args:
        file: the federation file.
        runs: what is to run; those that fail do not stop the others.
        folder: where ``runs/<name>/`` has each run's ``federation.toml``, ``log.txt`` and ``result.json``.
        jobs: runs at once; 0 is `default_jobs`. Where ``simulation.slots`` is 0, they share the cores evenly.
        log: told a line for each run that has ended.
        overrides: settings for every run.
        keep: whether the state (ledger, models) of runs that are done stays.
        command: what simulates.

    Returns:
        The results by name, in the order of the runs; without those of runs that failed.

    Raises:
        FedgeError: a run is not possible (`runs.plan`; nothing was started), or another sweep uses the folder.
        SystemExit: ended by a signal; the status is 128 and its number.
    """
    return run_planned(plan(file, runs, overrides), folder, jobs=jobs, log=log, keep=keep, command=command)


def run_planned(
    planned: Sequence[Planned],
    folder: Path,
    *,
    jobs: int = 0,
    log: Callable[[str], None] = print,
    keep: bool = False,
    command: Command = simulation,
) -> dict[str, Result]:
    """`run_all` for runs that are checked."""
    folder = folder.absolute()
    with _reserved(folder):
        sweep = _Sweep(planned, folder, jobs or default_jobs(), log, keep, command)
        asyncio.run(sweep.run())
    if sweep.ended_by is not None:
        raise SystemExit(128 + sweep.ended_by)
    return finished(planned, folder)


def finished(planned: Iterable[Planned], folder: Path) -> dict[str, Result]:
    """The results that are there, by name: of the same settings, bundle, data and seed."""
    found = ((one.run.name, _result(one, folder)) for one in planned)
    return {name: result for name, result in found if result is not None}


class _RunError(Exception):
    """A run failed; the message is its last words."""


class _Sweep:
    def __init__(
        self,
        planned: Sequence[Planned],
        folder: Path,
        jobs: int,
        log: Callable[[str], None],
        keep: bool,
        command: Command,
    ) -> None:
        self._folder, self._jobs, self._log, self._keep, self._command = folder, jobs, log, keep, command
        self._count = len(planned)
        self._waiting = [one for one in planned if _result(one, folder) is None]
        self._left = len(self._waiting)
        self._started = time.monotonic()
        self.ended_by: int | None = None

    async def run(self) -> None:
        done = self._count - self._left
        self._log(f"{self._count} runs: {done} are there, {self._left} to go, {self._jobs} at a time")
        runs = iter(self._waiting)
        workers = asyncio.gather(*(self._work(runs) for _ in range(min(self._jobs, self._left))))
        with _heard(lambda number: self._stop(workers, number)):
            try:
                await workers
            except asyncio.CancelledError:
                if self.ended_by is None:
                    raise

    def _stop(self, workers: "asyncio.Future[list[None]]", number: int) -> None:
        if self.ended_by is None:
            self.ended_by = number
            workers.cancel()

    async def _work(self, runs: Iterator[Planned]) -> None:
        for one in runs:
            try:
                told = _line(one, await self._simulate(one))
            except _RunError as failure:
                told = f"failed: {failure} (all it said: {_home(one, self._folder) / 'log.txt'})"
            except OSError as error:
                told = f"failed: {error}"
            self._left -= 1
            self._log(f"[{self._count - self._left}/{self._count}] {one.run.name}: {told}; {self._rest()}")

    def _rest(self) -> str:
        if not self._left:
            return "none left"
        done = len(self._waiting) - self._left
        seconds = (time.monotonic() - self._started) / done * self._left
        return f"{self._left} left, about {_duration(seconds)}"

    async def _simulate(self, one: Planned) -> Result:
        home = _home(one, self._folder)
        state, file, out = home / "state", home / "federation.toml", home / "unfinished.json"
        await asyncio.to_thread(shutil.rmtree, state, ignore_errors=True)
        out.unlink(missing_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        file.write_text(settings_file(self._placed(one, state)), encoding="utf-8")
        with (home / "log.txt").open("wb") as log:
            status = await _guarded(self._command(file, out), log.fileno())
        if status:
            raise _RunError(_last_words(home / "log.txt") or f"ended with status {status}")
        try:
            result = {"run": _identity(one), **json.loads(out.read_bytes())}
        except (OSError, ValueError) as error:
            raise _RunError(f"it wrote no result ({error})") from error
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        out.replace(home / "result.json")
        if not self._keep:
            await asyncio.to_thread(shutil.rmtree, state, ignore_errors=True)
        return result

    def _placed(self, one: Planned, state: Path) -> Any:
        settings = one.federation
        slots = settings.simulation.slots or max(1, (os.cpu_count() or 1) // self._jobs)
        return msgspec.structs.replace(
            settings,
            federation=msgspec.structs.replace(settings.federation, state=str(state)),
            simulation=msgspec.structs.replace(settings.simulation, slots=slots),
        )


async def _guarded(command: Sequence[str], log: int) -> int:
    """Run a program to its end, in a session of its own; if this is cancelled or killed, so is the program."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "broker_server.guard", *command),
        stdin=asyncio.subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            # Its guard sees the end of the pipe, and lets it end in good order.
            assert process.stdin is not None
            process.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _GRACE_SECONDS)
        # Whatever it left behind, the program that did not end included.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@contextmanager
def _heard(told: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM are told, where this is the main thread, and mean what they meant again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, before = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, told, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror}); name a folder to write to") from error
    try:
        lock = Lock(folder / "sweep")
    except LedgerError as error:
        raise FedgeError(f"{folder}: another sweep uses it; wait for its end, or name another folder") from error
    with lock:
        yield


def _home(one: Planned, folder: Path) -> Path:
    return folder / "runs" / one.run.name


def _identity(one: Planned) -> dict[str, object]:
    run = one.run
    return {
        "name": run.name,
        "variant": run.variant,
        "seed": run.seed,
        "settings": dict(run.settings),
        "fingerprint": one.fingerprint,
    }


def _result(one: Planned, folder: Path) -> Result | None:
    try:
        found = json.loads((_home(one, folder) / "result.json").read_bytes())
        same = found["run"]["fingerprint"] == one.fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A run may be called something else by now, or its settings be said in other words.
    return found | {"run": _identity(one)} if same else None


def _line(one: Planned, result: Result) -> str:
    metric, rounds = one.federation.stop.metric, result["rounds"]
    last = next((done["metrics"][metric] for done in reversed(rounds) if metric in done["metrics"]), None)
    shown = f"{metric} {last:.4f}, " if isinstance(last, float) and math.isfinite(last) else ""
    return f"{shown}{len(rounds)} rounds in {_duration(result['seconds'])}"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("fedge: ") if lines else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
