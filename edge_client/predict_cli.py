"""`fedge predict`: what the device's newest model says about the samples in a file."""

import sys
from pathlib import Path

import click
import numpy as np

from edge_client.data import Arrays, read_npz, read_table
from edge_client.errors import DataError
from edge_client.manifest import Feature


@click.command()
@click.argument("samples", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/fedge/state"),
    show_default=True,
    help="The state folder of a client, its model folder, or one version in it.",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), default=None, help="Write all outputs to this .npz.")
def predict(samples: Path, model: Path, output: Path | None) -> None:
    """Predict with the newest model of this device: the global one, or its own where it has one.

    INPUT is an .npz file of the bundle's inputs, or a .csv file of its one input's columns. Prints a class, or the
    outputs, in a line for each sample. The client may be training meanwhile.
    """
    # ONNX Runtime kills the process on some processors: whoever asks the doctor why must not load it.
    from edge_client.predict import Model

    opened = Model.open(model)
    given = _inputs(samples, opened.description.inputs[0], opened.description.targets)
    inputs = {feature.name: given.get(feature.name) for feature in opened.description.inputs}
    found = opened.predict(**inputs)
    if output is not None:
        np.savez(output, **found)  # type: ignore[arg-type]
    if any(target.dtype == "int64" for target in opened.description.targets):
        for label in opened.classes(**inputs):
            click.echo(label)
    else:
        first = found[opened.description.outputs[0].name]
        np.savetxt(sys.stdout, first.reshape(len(first), -1), fmt="%.7g", delimiter=",")
    own = opened.description.personal
    of = f", this device's own ({own})" if own else ""
    click.echo(f"version {opened.version} of {opened.description.name!r}{of}", err=True)


def _inputs(path: Path, feature: Feature, targets: tuple[Feature, ...]) -> Arrays:
    if path.suffix != ".csv":
        return read_npz(path)
    header, table = read_table(path)
    # What was trained on has the targets too, in columns that may come first.
    named = {name for target in targets for name in _columns(target)}
    columns = [place for place, name in enumerate(header) if name not in named]
    wanted = int(np.prod(feature.shape))
    if len(columns) < wanted:
        raise DataError(
            f"{path}: {len(columns)} columns without the targets'; input {feature.name!r} has {wanted}, before others"
        )
    return {feature.name: table[:, columns[:wanted]].reshape(-1, *feature.shape).astype(feature.dtype)}


def _columns(target: Feature) -> list[str]:
    if not target.shape:
        return [target.name]
    return [f"{target.name}.{place}" for place in range(int(np.prod(target.shape)))]
