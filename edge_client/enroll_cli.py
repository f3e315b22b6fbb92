"""`fedge enroll`: a claim becomes the identity of this device."""

import asyncio
import math
from pathlib import Path

import click

from edge_client.cli import INSECURE, default_state


@click.command()
@click.argument("claimfile", type=click.Path(path_type=Path))
@click.option("--id", "client", required=True, help="This device's name in the federation, unique in it.")
@click.option("--state", type=click.Path(path_type=Path), default=None, help="Folder for this device's state.")
@click.option(
    "--identity", type=click.Path(path_type=Path), default=None, help="Folder for keys.  [default: STATE/identity]"
)
@click.option("--wait", type=click.FloatRange(min=0, min_open=True), default=math.inf, help="Give up after SECONDS.")
@INSECURE
def enroll(
    claimfile: Path, client: str, state: Path | None, identity: Path | None, wait: float, insecure: bool
) -> None:
    """Get this device's own certificate with a claim.

    CLAIMFILE was made by `fedge claim` and is good for one device. The device's private key is made here and stays
    here. Broken off, it goes on where it was; on a device that is enrolled it does nothing.
    """
    # Here: `fedge --help` loads every command.
    from edge_client.trust.claim import Claim
    from edge_client.trust.enrol import enroll as run

    claim = Claim.load(claimfile)
    claim.address.check(insecure=insecure)
    folder = identity or (state or default_state(claim.federation, client)) / "identity"

    def log(line: str) -> None:
        click.echo(line, err=True)

    log(f"{client}: enrolling in {claim.federation!r} at {claim.address}")
    made = asyncio.run(run(claim, client, folder, log, patience=wait))
    click.echo(f"{made.client} is enrolled in {made.federation!r}; its key and certificate are in {folder}")
