"""`fedge bench`: how fast this device trains, and what it takes."""

from pathlib import Path

import click
import msgspec

from edge_client.errors import ConfigError, StoreError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--state", type=click.Path(path_type=Path), default=Path("/var/lib/fedge/state"), show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="How long to train.")
@click.option("--batch", type=click.IntRange(1, 65_536), default=32, show_default=True, help="Samples in a step.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print it for a program.")
def bench(bundle: Path | None, state: Path, seconds: float, batch: int, threads: int, as_json: bool) -> None:
    """Train a bundle on noise and say how fast that was, and what it took.

    Without BUNDLE it takes the one that the client whose state folder is given has from its federation.
    """
    if not 0 < seconds <= 86_400:
        raise ConfigError(f"--seconds {seconds}: expected more than 0, and at most a day")
    # ONNX Runtime kills the process on some processors: whoever asks the doctor why must not load it.
    from edge_client import runtime
    from edge_client.bench import measure
    from edge_client.bundle import Bundle

    runtime.spare_memory()
    found = measure(Bundle.open(bundle or _stored(state)), seconds=seconds, batch_size=batch, threads=threads)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    click.echo(f"{found.bundle}: {found.parameters:,} parameters, batches of {batch}, threads {threads}")
    if found.board:
        click.echo(f"board: {found.board}")
    click.echo(f"{found.steps_per_second:.2f} steps/s, {found.samples_per_second:.0f} samples/s")
    click.echo(f"{found.peak_mib:.0f} MiB of memory at the peak")
    if found.degrees_before is not None and found.degrees_hottest is not None:
        click.echo(f"{found.degrees_before:.0f} degrees before, {found.degrees_hottest:.0f} at the hottest")
    if found.watts is not None and found.joules_per_step is not None:
        click.echo(f"{found.watts:.2f} W, {found.joules_per_step * 1000:.1f} mJ a step")


def _stored(state: Path) -> Path:
    found = sorted(state.glob("bundle-*.fedge"))
    if not found:
        raise StoreError(f"{state}: no bundle there; name one, or the --state of a client that has joined")
    return found[-1]
