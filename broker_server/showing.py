"""What the server's commands print: a round in a line, models in a table, what evaluations found."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from broker_server.artifacts import Report
from broker_server.config import Federation
from broker_server.findings import Findings
from broker_server.findings_table import lines, tables
from broker_server.records import Round, Task
from broker_server.report import brief, human_bytes
from broker_server.server import Outcome


def logger(console: Console) -> Callable[[str], None]:
    """Prints lines as they are: what a client says may hold brackets, which rich would take for styles."""
    return lambda line: console.print(line, markup=False, soft_wrap=True)


def round_line(done: Round) -> str:
    """What a round came to, in a line."""
    shown = "".join(f" · {text}" for text in brief(done.metrics))
    traffic = f"up {human_bytes(done.bytes_up)} · down {human_bytes(done.bytes_down)}"
    trained = f"{done.clients} clients" if done.clients else f"version {done.version} in service"
    return f"round {done.round} · {trained} · {done.seconds:.1f} s · {traffic}{shown}"


def tell_outcome(console: Console, outcome: Outcome) -> None:
    """How a run ended."""
    log = logger(console)
    log(f"ended: {outcome.reason}")
    if outcome.dropped:
        log(f"dropped: {outcome.dropped} messages that were malformed, foreign or too large")
    for folder in outcome.models:
        log(f"model: {folder}")


def plain_findings(found: Sequence[Findings]) -> dict[str, object]:
    """The first findings and the newest, for JSON; nothing where there are none."""
    return {"first": found[0].plain(), "newest": found[-1].plain()} if found else {}


def show_findings(console: Console, found: Sequence[Findings]) -> None:
    """The newest findings: tables, and what they do not tell."""
    for shown in tables(found):
        console.print(shown)
    for line in lines(found):
        logger(console)(line)


def show_buffer(
    console: Console, settings: Federation, tasks: list[Task], recorded: Mapping[tuple[int, int], int]
) -> None:
    """What the next version is made of so far, and how many clients are asked; by number of versions behind."""
    training = [task for task in tasks if task.kind == "train"]
    if not training:
        return
    have = sum(recorded[task.epoch, task.task] for task in training)
    newest = max(task.version for task in tasks)
    console.print(f"version {newest + 1}: {have} of {settings.round.buffer} updates recorded")
    asked = [task for task in training if not recorded[task.epoch, task.task]]
    oldest = newest - min((task.version for task in asked), default=newest)
    console.print(f"{len(asked)} clients have a task without an update, the oldest from {oldest} versions before")


def show_models(console: Console, report: Report | None, title: str) -> None:
    """A table of deployable models: size, time and worth of each, and why one is missing."""
    if report is None:
        return
    names = list(dict.fromkeys(name for model in report.models for name in model.metrics))
    head = ("model", "size", *(f"ms for {rows}" for rows in report.models[0].milliseconds), *names)
    shown = Table(*head, title=title, header_style="bold")
    for model in report.models:
        times = [
            f"{model.milliseconds[rows]:.3f}" if model.milliseconds else "" for rows in report.models[0].milliseconds
        ]
        values = [f"{model.metrics[name]:.4f}" if name in model.metrics else "" for name in names]
        shown.add_row(model.file, human_bytes(model.bytes) if model.bytes else "", *times, *values)
    console.print(shown)
    log = logger(console)
    for model in report.models:
        for text in (model.problem, model.worse):
            if text:
                log(f"{model.file}: {text}")
    samples = f"{report.samples} held-out samples, " if report.samples else ""
    log(f"{samples}onnxruntime {report.onnxruntime}, {report.machine}, {report.threads} thread(s)")
