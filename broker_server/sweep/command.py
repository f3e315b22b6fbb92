"""``fedge simulate --sweep``: from a sweep file to a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from broker_server.config import load
from broker_server.sweep.figures import rows, summary, swept
from broker_server.sweep.grid import expand, read_sweep
from broker_server.sweep.results import need, summary_table, write_csv, write_parquet
from broker_server.sweep.running import finished, run_planned
from broker_server.sweep.runs import plan
from broker_server.sweep.tracking import TRACKERS, check_trackers
from edge_client.errors import ConfigError


def sweep(
    file: Path,
    path: Path,
    folder: Path,
    *,
    overrides: Mapping[str, object],
    jobs: int = 0,
    keep: bool = False,
    parquet: bool = False,
    track: Sequence[str] = (),
) -> None:
    """Run what the sweep file ``path`` says, write ``results.csv`` and ``summary.csv`` to ``folder``, show a table.

    Raises:
        FedgeError: a run is not possible, or a package that is asked for is not installed; nothing was started.
        SystemExit: 1 where runs failed, 128 and the signal's number where one ended it; what is done is written.
    """
    console = Console(stderr=True, highlight=False)
    if parquet:
        need("pyarrow", "--parquet")
    check_trackers(track)
    wanted = read_sweep(path)
    seed = 0 if wanted.seeds else load(file, overrides).federation.seed
    planned = plan(file, expand(wanted, seed), overrides)

    def log(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    ended: SystemExit | None = None
    try:
        run_planned(planned, folder, jobs=jobs, log=log, keep=keep)
    except SystemExit as signal:
        ended = signal
    results = finished(planned, folder)
    found, keys = rows(planned, results), swept(planned)
    lines = summary(found, keys)
    settings = planned[0].federation
    try:
        write_csv(folder / "results.csv", found)
        write_csv(folder / "summary.csv", lines)
        if parquet:
            write_parquet(folder / "results.parquet", found)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); make room, then run it again") from error
    if lines:
        title, higher = settings.federation.name, settings.stop.higher_is_better
        console.print(summary_table(lines, keys, higher_is_better=higher, title=title))
    log(f"results: {folder / 'results.csv'}, over seeds: {folder / 'summary.csv'}")
    for name in track:
        log(f"{name}: {TRACKERS[name](folder, settings.federation.name, found, results, keys)}")
    if ended is not None:
        log(f"ended by a signal: {len(results)} of {len(planned)} runs are done; the same command does the others")
        raise ended
    if failed := [one.run.name for one in planned if one.run.name not in results]:
        log(f"failed: {', '.join(failed)}; the same command tries {'it' if len(failed) == 1 else 'them'} again")
        raise SystemExit(1)
