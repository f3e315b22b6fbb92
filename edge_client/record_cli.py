"""`fedge record`: what a program prints, or a function returns, goes into a ring of records to train on."""

import csv
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import click
import msgspec

from edge_client.errors import ConfigError, DataError
from edge_client.feeds.ring import Recorder

_LONGEST = 16 << 20
"""Bytes of the longest line."""
_ID = "id"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["ndjson", "csv"]), default="ndjson", show_default=True)
@click.option("--limit", metavar="MIB", type=click.IntRange(min=1), default=64, show_default=True, help="Disk space.")
@click.option("--sync", default=5.0, show_default=True, help="Seconds of records that a power cut may cost.")
@click.option("--call", metavar="MODULE:FUNCTION", default=None, help="Record what this function returns instead.")
@click.option("--every", default=1.0, show_default=True, help="Seconds between its calls.")
def record(folder: Path, kind: str, limit: int, sync: float, call: str | None, every: float) -> None:
    """Record samples from standard input into the ring at FOLDER, for `fedge join --data ring:FOLDER`.

    A line is a JSON object, or, with --format csv, a row below a header: inputs and targets by their names in the
    bundle, or for a bundle of one input the columns in order. A field "id" names the sample: a later line of that id
    adds to it, say its label: {"id": "a17", "y": 3}. A line that is none is named once and skipped.
    """
    if not 0 <= sync <= 86_400 or not 0 <= every <= 86_400:
        raise ConfigError(f"--sync {sync}, --every {every}: expected seconds, at most a day")
    # A shell's background job ignores SIGINT from the start, unless it says otherwise.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    recorded = skipped = 0
    with Recorder(folder, limit=limit << 20, sync=sync) as recorder:
        try:
            for found in _called(call, every) if call is not None else _lines(sys.stdin.buffer, kind):
                try:
                    if isinstance(found, DataError):
                        raise found
                    name = found.get(_ID)
                    recorder.record(
                        {field: value for field, value in found.items() if field != _ID},
                        id=None if name is None else str(name),
                    )
                    recorded += 1
                except DataError as error:
                    skipped += 1
                    if skipped == 1:
                        click.echo(f"skipped: {error} (further ones are only counted)", err=True)
        except KeyboardInterrupt:
            pass
    click.echo(f"{recorded} records into {folder}, {skipped} skipped", err=True)


def _lines(stream: BinaryIO, kind: str) -> Iterator[Mapping[str, object] | DataError]:
    header: list[str] = []
    number = 0
    while line := stream.readline(_LONGEST):
        number += 1
        try:
            if not line.endswith(b"\n") and len(line) == _LONGEST:
                raise ValueError(f"longer than {_LONGEST} bytes")
            text = line.decode("utf-8-sig").strip()
            if not text:
                continue
            if kind == "ndjson":
                yield msgspec.json.decode(text, type=dict[str, object])
                continue
            row = [cell.strip() for cell in next(csv.reader([text]))]
            if not header:
                header = row
            elif len(row) != len(header):
                raise ValueError(f"{len(row)} cells below a header of {len(header)}")
            else:
                # An empty cell is what is not known yet.
                yield {
                    name: cell if name == _ID else _number(cell) for name, cell in zip(header, row, strict=True) if cell
                }
        except (ValueError, csv.Error, msgspec.DecodeError) as error:
            yield DataError(f"line {number}: {error}; expected {'a JSON object' if kind == 'ndjson' else 'a CSV row'}")


def _called(spec: str, every: float) -> Iterator[Mapping[str, object] | DataError]:
    module, _, attribute = spec.partition(":")
    # A console script does not search the working directory, where a user's module lies.
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], object] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--call {spec!r}: {error}; expected module:function") from error
    due = time.monotonic()
    while True:
        try:
            found = function()
        except StopIteration:
            return
        except Exception as error:
            yield DataError(f"{spec}: {type(error).__name__}: {error}")
        else:
            if isinstance(found, Mapping):
                yield {str(name): value for name, value in found.items()}
            elif found is not None:
                yield DataError(f"{spec} returned {type(found).__name__}; expected a mapping of fields, or None")
        due = max(due + every, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _number(cell: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)
