"""Run a fleet as a process of its own: ``python -m edge_client.emulator fleet.json``.

It runs until the federation has finished or its standard input closes, and then prints one line of JSON, the report.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from edge_client.emulator.fleet import Fleet, FleetSpec
from edge_client.errors import ConfigError, FedgeError


@click.command()
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(spec: Path) -> None:
    """Emulate the phones that SPEC (JSON, see FleetSpec) describes."""
    try:
        try:
            settings = msgspec.json.decode(spec.read_bytes(), type=FleetSpec)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{spec}: {error}") from error
        click.echo(asyncio.run(_run(settings)))
    except FedgeError as error:
        click.echo(f"fedge: {error}", err=True)
        sys.exit(2)


async def _run(spec: FleetSpec) -> str:
    # A parent that dies closes the pipe, so no fleet outlives it.
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if not spec.url:
        spec = msgspec.structs.replace(spec, url=(await reader.readline()).decode().strip())
    fleet = Fleet(spec, lambda line: click.echo(line, err=True))
    parent = asyncio.ensure_future(reader.read())
    life = asyncio.ensure_future(fleet.run())
    everything: list[asyncio.Future[Any]] = [parent, life]
    await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
    parent.cancel()
    if life.done():
        life.result()
    else:
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
    return msgspec.json.encode(fleet.report()).decode()


if __name__ == "__main__":
    main()
