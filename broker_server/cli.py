"""The sub-commands of the server: serve, simulate, status, models, deploy, demo."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from broker_server.artifacts import check_folder, read_report, read_tensors, write_artifacts
from broker_server.config import Federation, load
from broker_server.connection import broker, hush, keys, server_link
from broker_server.entrance import enter
from broker_server.findings_table import read_findings
from broker_server.fleet import FleetCare
from broker_server.ledger import BEST, Ledger
from broker_server.records import Round
from broker_server.report import human_bytes, table
from broker_server.server import Outcome, Server, locked
from broker_server.showing import (
    logger,
    plain_findings,
    round_line,
    show_buffer,
    show_findings,
    show_models,
    tell_outcome,
)
from broker_server.simulation import Simulated
from broker_server.simulation import simulate as run_simulation
from broker_server.sweep.command import sweep
from broker_server.worker import ledger_path
from edge_client.address import Address
from edge_client.bundle import Bundle
from edge_client.data import open_data
from edge_client.errors import ConfigError, LedgerError
from edge_client.tls import Tls
from edge_client.transport import Link, MqttLink

_FAULTS = 10
"""The latest things that clients did wrong, as many as are shown."""
_FILE = click.argument("file", type=click.Path(path_type=Path))
_EVALUATE = click.option(
    "--evaluate", is_flag=True, help='Nobody trains: clients evaluate the newest version (round.mode = "evaluation").'
)
_INSECURE = click.option("--insecure", is_flag=True, help="Go to another machine's broker without TLS.")


@click.command()
@_FILE
@_EVALUATE
@_INSECURE
def serve(file: Path, evaluate: bool, insecure: bool) -> None:
    """Run a federation: broker and server.

    FILE is the federation's TOML file. Stopped and started again, the server goes on where it was.
    """
    settings, console = load(file, _mode(evaluate)), Console(stderr=True, highlight=False)

    log = logger(console)

    async def run() -> Outcome:
        with (
            locked(settings) as lock,
            keys(settings) as keyring,
            broker(settings, log, insecure=insecure) as (address, tls),
        ):
            # A broker of ours that died does not come back: give up, and whoever watches the server starts both anew.
            link = server_link(settings, address, attempts=0 if settings.broker.url else 5, tls=tls)
            fit = partial(enter, address=address, log=log, tls=tls, keyring=keyring)
            server = Server(
                settings,
                log,
                link,
                on_round=lambda done: log(round_line(done)),
                lock=lock,
                fit=fit,
                keyring=keyring,
                hush=hush(settings, log),
                fleet=FleetCare(Path(settings.federation.state), log, time.time),
            )
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop, "stopped by signal")
            async with _enrolling(settings, address, tls, log):
                return await server.run()

    tell_outcome(console, asyncio.run(run()))


@click.command()
@_FILE
@click.option("--clients", type=click.IntRange(1), default=None, help="Emulated phones; replaces simulation.clients.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting, as stop.rounds=5.")
@click.option("--json", "path", type=click.Path(path_type=Path), default=None, help="Write the results here.")
@_EVALUATE
@_INSECURE
@click.option(
    "--sweep", "sweep_file", type=click.Path(path_type=Path), default=None, help="Run all that this file says."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=None, help="Sweep: folder for the results.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Sweep: runs at once.  [default: half the cores]")
@click.option("--keep", is_flag=True, help="Sweep: keep ledgers and models of runs that are done.")
@click.option("--parquet", is_flag=True, help="Sweep: write results.parquet, too (needs pyarrow).")
@click.option(
    "--track", type=click.Choice(["mlflow", "tensorboard"]), multiple=True, help="Sweep: write for this, too."
)
def simulate(
    file: Path,
    clients: int | None,
    overrides: tuple[str, ...],
    path: Path | None,
    evaluate: bool,
    insecure: bool,
    sweep_file: Path | None,
    output: Path | None,
    jobs: int | None,
    **more: Any,
) -> None:
    """Run a federation with emulated phones.

    Broker, protocol and training are the real ones.

    FILE is the federation's TOML file; its [simulation] section describes the phones and their data. With --sweep it
    is run with many settings and seeds; what is done already is not done again.
    """
    replaced = dict(_override(text) for text in overrides) | _mode(evaluate)
    if clients is not None:
        replaced["simulation.clients"] = clients
    if sweep_file is not None:
        if output is None or path is not None or insecure:
            raise ConfigError("--sweep needs -o FOLDER for its results, and goes with neither --json nor --insecure")
        sweep(file, sweep_file, output, overrides=replaced, jobs=jobs or 0, **more)
        return
    if output is not None or jobs is not None or any(more.values()):
        raise ConfigError("-o, --jobs, --keep, --parquet and --track are for a sweep; add --sweep FILE")
    settings = load(file, replaced)
    if path is not None:
        _writable(path)
    console = Console(stderr=True, highlight=False)
    with progress(settings, console) as bar:
        result = asyncio.run(run_simulation(settings, logger(console), bar, insecure=insecure))
    if not result.rounds:
        raise ConfigError(
            f"there was nothing left to do in {settings.federation.state}: {result.outcome.reason}; "
            "remove that folder to start over, name another in federation.state, or raise the stop condition"
        )
    console.print(table(result.rounds, metric=settings.stop.metric, title=settings.federation.name))
    show_findings(console, result.findings)
    tell_outcome(console, result.outcome)
    fleet = result.fleet
    console.print(f"{fleet.clients} phones sent {human_bytes(fleet.sent)} and received {human_bytes(fleet.received)}")
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results(result)), indent=2))


@click.command()
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print rounds, and what evaluations found, for a program.")
def status(file: Path, as_json: bool) -> None:
    """Show what a federation has done so far, also while it runs."""
    settings, console = load(file), Console(highlight=False)
    with _ledger(settings) as ledger:
        rounds = ledger.rounds()
        found = read_findings(ledger.findings())
        open_tasks = ledger.open_tasks()
        recorded = {(task.epoch, task.task): len(ledger.recorded(task.epoch, task.task)) for task in open_tasks}
        faults = ledger.misconduct()[-_FAULTS:]
    if as_json:
        click.echo(
            msgspec.json.format(msgspec.json.encode({"rounds": rounds, "findings": plain_findings(found)}), indent=2)
        )
        return
    if rounds:
        console.print(table(rounds, metric=settings.stop.metric, title=settings.federation.name))
    else:
        console.print(f"{settings.federation.name}: no round is finished yet")
    show_findings(console, found)
    for fault in faults:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fault.time))
        heard = f"not listened to for {fault.seconds:.0f} s: " if fault.kind == "muted" else ""
        logger(console)(f"{when} {fault.client}: {heard}{fault.reason}")
    if settings.round.mode == "buffered":
        show_buffer(console, settings, open_tasks, recorded)
        return
    for task in open_tasks:
        have = recorded[task.epoch, task.task]
        console.print(f"round {task.round}: {task.kind} under way, {have} of {len(task.cohort)} results recorded")


@click.command()
@_FILE
def models(file: Path) -> None:
    """List the versions of the global model.

    Also names the deployable models that were written.
    """
    settings, console = load(file), Console(highlight=False)
    with _ledger(settings) as ledger:
        versions, best = ledger.versions(), ledger.get(BEST)
        metrics = {done.version: done.metrics for done in ledger.rounds()}
    shown = Table("version", "round", settings.stop.metric, "kept", "", header_style="bold")
    for version, made_in, kept in versions:
        value = metrics.get(version, {}).get(settings.stop.metric)
        marks = [name for name, which in (("best", best), ("last", str(versions[-1][0]))) if which == str(version)]
        shown.add_row(
            str(version),
            str(made_in),
            "" if value is None else f"{value:.4f}",
            "yes" if kept else "",
            ", ".join(marks),
        )
    console.print(shown)
    for folder in sorted(Path(settings.federation.state, "models").glob("*")):
        logger(console)(f"{folder.name}: {', '.join(sorted(entry.name for entry in folder.iterdir()))} in {folder}")
        show_models(console, read_report(folder), folder.name)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--weights", type=click.Path(path_type=Path), default=None, help="Trained weights; the bundle's unless given."
)
@click.option("--data", default=None, help="Held-out data: an .npz file, a folder of .csv files, or module:function.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads to measure with.", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the models.")
def deploy(bundle: Path, weights: Path | None, data: str | None, threads: int, output: Path) -> None:
    """Make deployable models of a bundle and trained weights.

    BUNDLE is a file that `fedge export` made; --weights names a safetensors file, such as a federation's
    global.safetensors. Held-out data calibrates the static 8-bit model and tells how good each model is.
    """
    output = output.resolve()
    check_folder(output)
    console, opened = Console(highlight=False), Bundle.open(bundle)
    first = opened.first(opened.trained), opened.first(opened.tracked)
    vector, buffers = first if weights is None else read_tensors(weights, opened)
    source = None if data is None else open_data(data, opened.manifest)
    show_models(
        console, write_artifacts(output, opened, vector, data=source, buffers=buffers, threads=threads), str(output)
    )


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
def demo(output: Path) -> None:
    """Train the digits on 20 emulated phones, offline.

    Exports a CNN, starts broker, server and phones that see few classes each, and shows accuracy and bytes.
    """
    from broker_server.demo import run_demo

    run_demo(output, Console(highlight=False))


class RoundBar:
    """A progress bar that a round's result moves on: rounds, metric, bytes."""

    def __init__(self, bar: Progress, task: TaskID, metric: str) -> None:
        self._bar, self._task, self._metric, self._bytes = bar, task, metric, [0, 0]

    def __call__(self, result: Round) -> None:
        """Show one more round."""
        self._bytes = [self._bytes[0] + result.bytes_up, self._bytes[1] + result.bytes_down]
        value = result.metrics.get(self._metric)
        shown = "" if value is None else f"{self._metric} {value:.4f} · "
        traffic = f"up {human_bytes(self._bytes[0])} · down {human_bytes(self._bytes[1])}"
        self._bar.update(self._task, advance=1, description=shown + traffic)


@contextmanager
def progress(settings: Federation, console: Console) -> Iterator[RoundBar]:
    """A bar over the rounds that the settings allow."""
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        yield RoundBar(
            bar, bar.add_task("waiting for phones", total=settings.stop.rounds or None), settings.stop.metric
        )


def results(result: Simulated) -> dict[str, object]:
    """A simulation as plain data, for JSON."""
    return {
        "rounds": [msgspec.to_builtins(done) for done in result.rounds],
        "reason": result.outcome.reason,
        "seconds": result.seconds,
        "clients": result.fleet.clients,
        "bytes_up": result.fleet.sent,
        "bytes_down": result.fleet.received,
        "dropped": result.fleet.dropped,
        "peak_rss_mib": result.peak_rss_mib,
        "findings": plain_findings(result.findings),
        "models": {folder: msgspec.to_builtins(report) for folder, report in result.outcome.models.items()},
    }


def _mode(evaluate: bool) -> dict[str, object]:
    return {"round.mode": "evaluation"} if evaluate else {}


@asynccontextmanager
async def _enrolling(
    settings: Federation, address: Address, tls: Tls | None, log: Callable[[str], None]
) -> AsyncIterator[None]:
    """Enrol devices meanwhile, where the federation has an authority."""
    trust = settings.trust
    if not trust.authority:
        yield
        return
    # A federation that does not sign does not load its library.
    from broker_server.responder import responding

    folder = Path(trust.authority)
    own = Tls.of(folder, "enrol") if tls is None else replace(Tls.of(folder, "enrol"), ca=tls.ca)

    def connect(name: str) -> Link:
        return MqttLink(address, name, tls=own)

    rule, days = trust.approve, trust.certificate_days
    async with responding(folder, settings.federation.name, connect, log, rule=rule, days=days):
        yield


def _writable(path: Path) -> None:
    """Find out before the run, not after it, that its results have no place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}; name a file that can be written") from error


@contextmanager
def _ledger(settings: Federation) -> Iterator[Ledger]:
    path = ledger_path(settings)
    if not path.exists():
        raise LedgerError(f"{path} does not exist: this federation has not been served yet; run `fedge serve` first")
    with Ledger.read(path) as ledger:
        yield ledger


def _override(text: str) -> tuple[str, object]:
    key, separator, value = text.partition("=")
    if not separator or "." not in key:
        raise ConfigError(f"--set {text!r}: expected section.key=value, such as stop.rounds=5")
    try:
        return key, msgspec.toml.decode(f"value = {value}".encode())["value"]
    except msgspec.DecodeError:
        return key, value
