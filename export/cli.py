"""``fedge export``: a factory in Python becomes a bundle."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import nn

from edge_client.errors import ExportError
from export.bundle import export_bundle
from export.losses import LOSSES, parse_options
from export.step import OPTIMIZERS


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
@click.option("--optimizer", default="sgd", show_default=True, help=f"One of {', '.join(OPTIMIZERS)}.")
@click.option("--lr", default=0.05, show_default=True, help="Default learning rate.")
@click.option("--momentum", default=0.9, show_default=True, help="Default momentum, with --optimizer momentum.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Default weight decay.")
@click.option("--proximal", is_flag=True, help="Take the proximal term of FedProx as an input.")
@click.option("--scale", default=1.0, show_default=True, help="Integer data is multiplied by this on the device.")
@click.option("--labels", default="", help="Class names, separated by commas.")
@click.option("--seed", default=0, show_default=True, help="Seed of the initial weights.")
@click.option("--name", default=None, help="Name of the model; the function's unless given.")
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
    weight_decay: float,
    proximal: bool,
    scale: float,
    labels: str,
    seed: int,
    name: str | None,
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
        weight_decay=weight_decay,
        proximal=proximal,
        labels=[label.strip() for label in labels.split(",") if label.strip()],
        scale=scale,
    )
    sizes = ", ".join(f"{member} {size / 1024:.1f} KiB" for member, size in report.sizes.items())
    trainable = report.manifest.layout().size
    click.echo(f"{report.path}: {title}, {trainable:,} trainable parameters, {report.seconds:.1f} s")
    click.echo(f"  {sizes}")
    click.echo(
        f"  parity with PyTorch {report.parity.torch}: worst relative error "
        f"{report.parity.worst_relative_error:.1e} over {report.parity.cases} cases "
        f"(allowed {report.parity.tolerance:.0e})"
    )
