"""``fedge export``: a factory in Python becomes a bundle."""

import importlib
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import nn

from edge_client.errors import ExportError
from export.bundle import export_bundle
from export.lora import Lora
from export.losses import LOSSES, parse_options
from export.memory import format_size, parse_size
from export.partial import TrainOnly
from export.training import PLANNED_BATCH
from export.updates import UPDATES


def load_module(factory: str) -> nn.Module:
    """Call ``package.module:function`` or ``file.py:function`` and return the module that it makes.

    Raises:
        ExportError: it does not exist, fails, or does not return an `nn.Module`.
    """
    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name:
        raise ExportError(f"factory {factory!r} is not of the form package.module:function or file.py:function")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise ExportError(f"factory {factory!r}: there is no file {place}")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            source = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(source)
        else:
            # A model usually lies in the working directory, which an installed command does not search.
            if str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            source = importlib.import_module(place)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"factory {factory!r}: {place} cannot be imported: {_line(error)}") from error
    made = getattr(source, name, None)
    if made is None:
        known = [key for key, value in vars(source).items() if callable(value) and not key.startswith("_")]
        raise ExportError(f"factory {factory!r}: {place} has no {name!r}; it has {', '.join(known[:8]) or 'nothing'}")
    if not callable(made) or isinstance(made, nn.Module):
        raise ExportError(f"factory {factory!r} is a {type(made).__name__}; name a function that returns an nn.Module")
    try:
        module = made()
    except Exception as error:
        raise ExportError(f"factory {factory!r} failed: {_line(error)}; it is called without arguments") from error
    if not isinstance(module, nn.Module):
        raise ExportError(f"factory {factory!r} returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise ExportError(f"--input {text!r} is not a shape; give sizes without the batch, such as 1,28,28")
    return sizes


def _lora(rank: int | None, alpha: float | None, targets: Sequence[str], train: Sequence[str]) -> Lora | None:
    if rank is None:
        if alpha is not None or targets or train:
            raise ExportError("--lora-alpha, --lora-target and --lora-train need --lora-rank, which asks for adapters")
        return None
    return Lora(rank, 2.0 * rank if alpha is None else alpha, tuple(targets) or ("*",), tuple(train))


@click.command()
@click.argument("factory")
@click.option(
    "--input", "shapes", multiple=True, required=True, help="Shape without the batch, as 1,28,28; repeatable."
)
@click.option(
    "--input-dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "int64"]),
    help="One for each --input; float32 unless given.",
)
@click.option("--loss", default="cross_entropy", show_default=True, help=f"One of {', '.join(sorted(LOSSES))}.")
@click.option("--loss-option", "loss_options", multiple=True, help="Such as weight=1,2,4; repeatable.")
@click.option("--optimizer", default="sgd", show_default=True, help=f"One of {', '.join(UPDATES)}.")
@click.option("--lr", default=0.05, show_default=True, help="Default learning rate.")
@click.option("--momentum", default=0.9, show_default=True, help="Default momentum, with momentum and nesterov.")
@click.option(
    "--beta1", default=0.9, show_default=True, help="Default decay of the mean gradient, with adam and adamw."
)
@click.option(
    "--beta2", default=0.999, show_default=True, help="Default decay of the mean square, with adam and adamw."
)
@click.option("--eps", default=1e-8, show_default=True, help="Default epsilon, with adam and adamw.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Default weight decay.")
@click.option(
    "--clip", type=float, default=None, help="Clip gradients; default of their largest global norm, 0 is off."
)
@click.option("--proximal", is_flag=True, help="Take the proximal term of FedProx as an input.")
@click.option("--control", is_flag=True, help="Take the control variates of SCAFFOLD and FedDyn as inputs.")
@click.option("--freeze", multiple=True, help="Pattern of parameters that stay fixed, as features.*; repeatable.")
@click.option("--train-only", type=click.Choice(["bias"]), default=None, help="Train biases only.")
@click.option("--last", type=int, default=None, help="Train only the last so many modules that have parameters.")
@click.option("--lora-rank", type=int, default=None, help="Add low-rank adapters of this rank, and train only them.")
@click.option("--lora-alpha", type=float, default=None, help="Weight of the adapters; twice the rank unless given.")
@click.option(
    "--lora-target", "lora_targets", multiple=True, help="Pattern of layers to adapt; every linear one unless given."
)
@click.option("--lora-train", multiple=True, help="Pattern of parameters that train beside the adapters.")
@click.option("--personal", multiple=True, help="Pattern of what stays on each device, as head.*, or norm; repeatable.")
@click.option("--scale", default=1.0, show_default=True, help="Integer data is multiplied by this on the device.")
@click.option("--labels", default="", help="Class names, separated by commas.")
@click.option("--micro-batch", type=int, default=None, help="Rows that pass at once; a step adds up their gradients.")
@click.option(
    "--memory-budget", default=None, help="What a step at batch 32 may need beside the model and the batch, as 64MiB."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the initial weights.")
@click.option("--name", default=None, help="Name of the model; the function's unless given.")
@click.option(
    "--tune/--no-tune",
    default=True,
    show_default=True,
    help="Measure which way to compute each convolution is fastest here; without, equal models give equal bytes.",
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    help="Write sizes, times, parity and the choices for convolutions here, as JSON.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show how each convolution is computed.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Default: NAME.fedge."
)
def export(
    factory: str,
    shapes: Sequence[str],
    dtypes: Sequence[str],
    loss: str,
    loss_options: Sequence[str],
    optimizer: str,
    lr: float,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    proximal: bool,
    control: bool,
    freeze: Sequence[str],
    train_only: TrainOnly | None,
    last: int | None,
    lora_rank: int | None,
    lora_alpha: float | None,
    lora_targets: Sequence[str],
    lora_train: Sequence[str],
    personal: Sequence[str],
    scale: float,
    labels: str,
    micro_batch: int | None,
    memory_budget: str | None,
    seed: int,
    name: str | None,
    tune: bool,
    report_path: Path | None,
    verbose: bool,
    output: Path | None,
) -> None:
    """Export the PyTorch model that FACTORY makes (package.module:function or file.py:function) as a bundle."""
    if dtypes and len(dtypes) not in (1, len(shapes)):
        raise ExportError(f"{len(dtypes)} --input-dtype for {len(shapes)} --input; give one for each")
    kinds = list(dtypes) * (len(shapes) if len(dtypes) == 1 else 1) or ["float32"] * len(shapes)
    inputs = [(_shape(text), kind) for text, kind in zip(shapes, kinds, strict=True)]
    torch.manual_seed(seed)
    module = load_module(factory)
    title = name or factory.rpartition(":")[2]
    report = export_bundle(
        module,
        output or Path(f"{title}.fedge"),
        name=title,
        inputs=inputs,
        loss=loss,
        loss_options=parse_options(loss_options),
        optimizer=optimizer,
        lr=lr,
        momentum=momentum,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        proximal=proximal,
        control=control,
        freeze=freeze,
        train_only=train_only,
        last=last,
        lora=_lora(lora_rank, lora_alpha, lora_targets, lora_train),
        personal=personal,
        labels=[label.strip() for label in labels.split(",") if label.strip()],
        scale=scale,
        tune=tune,
        micro_batch=micro_batch,
        memory_budget=None if memory_budget is None else parse_size(memory_budget),
    )
    if report_path is not None:
        report.write(report_path)
    sizes = ", ".join(f"{member} {size / 1024:.1f} KiB" for member, size in report.sizes.items())
    trainable = report.manifest.layout().size
    fixed = sum(math.prod(p.shape) for p in report.manifest.parameters if p.role == "frozen")
    own = report.manifest.layout("personal", "personal-buffer").size
    click.echo(
        f"{report.path}: {title}, {trainable:,} trainable parameters"
        f"{f' and {fixed:,} frozen' if fixed else ''}{f', {own:,} more stay on each device' if own else ''}, "
        f"{report.seconds:.1f} s"
    )
    click.echo(f"  {sizes}")
    click.echo(f"  loads in {', '.join(f'{ms:.1f} ms ({kind})' for kind, ms in report.load_ms.items())}")
    memory = report.memory
    click.echo(
        f"  a step needs {format_size(memory.peak)} at batch {PLANNED_BATCH} beside the model"
        f"{f', in slices of {memory.rows} rows' if memory.rows else ''}"
        f"{f', with {memory.copies} nodes that compute values again' if memory.copies else ''}"
    )
    click.echo(
        f"  parity with PyTorch {report.parity.torch}: worst relative error "
        f"{report.parity.worst_relative_error:.1e} over {report.parity.cases} cases "
        f"(allowed {report.parity.tolerance:.0e})"
    )
    if report.convolutions:
        names = Counter(one.formulation for one in report.convolutions)
        ways = ", ".join(f"{count} {way}" for way, count in names.most_common())
        click.echo(f"  convolutions, by kind of layer: {ways}")
    if verbose:
        for convolution in report.convolutions:
            click.echo(f"    {convolution}")
