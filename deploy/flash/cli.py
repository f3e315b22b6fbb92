"""The sub-command flash."""

from pathlib import Path

import click

from edge_client.errors import FlashError


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
def flash(image: Path) -> None:
    """Say what is on the image of a card."""
    # Here: `fedge --help` loads every command.
    from deploy.flash.disk import partitions

    try:
        with image.open("rb") as disk:
            found = partitions(disk)
    except OSError as error:
        raise FlashError(f"{image}: cannot be read ({error.strerror}); expected an image or a card") from error
    for one in found:
        click.echo(f"partition {one.number}: {one.kind}, {one.size >> 20} MiB at {one.start}")
