"""The updates of a task, read from the ledger block by block, in bounded memory however many and large they are."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from broker_server.aggregation.cohort import Rows
from broker_server.aggregation.weighting import Report
from edge_client.codec.blocks import Block, blocks
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.update import UpdateReader
from edge_client.errors import LedgerError

ROOM = 1 << 25
"""Bytes of all updates' elements that are read at once; while the next are read, those of before may still be there."""


@dataclass(frozen=True)
class LedgerBlocks:
    """One vector of all updates of a task, as `cohort.Blocks`.

    A block of the codec is decoded once for each pass. Where all updates' do not fit into ``room`` bytes together, they
    wait in a file in ``scratch``, of at most 16 MiB an update, and are read from there some elements at a time.
    """

    reports: Sequence[Report]
    load: Callable[[int], bytes]
    """The encoded update of that place in ``reports``; one is in memory at a time."""
    layouts: Mapping[str, Layout]
    name: str
    """Of the vector."""
    scratch: Path
    room: int = ROOM

    @property
    def size(self) -> int:
        """Elements of the vector."""
        return self.layouts[self.name].size

    def read(self, members: Sequence[int] | None = None) -> Iterator[tuple[slice, Rows]]:
        """See `cohort.Blocks`.

        Raises:
            LedgerError: there is no room on the disk.
        """
        chosen = range(len(self.reports)) if members is None else members
        width = max(1, self.room // (4 * max(1, len(chosen))))
        for number, block in enumerate(blocks(self.layouts[self.name])):
            size = block.stop - block.start
            if size <= width:
                rows = np.empty((len(chosen), size), np.float32)
                for row, member in enumerate(chosen):
                    rows[row] = self._decode(member, number)
                yield block.where, rows
            else:
                yield from self._in_parts(chosen, number, block, width)

    def _in_parts(self, chosen: Sequence[int], number: int, block: Block, width: int) -> Iterator[tuple[slice, Rows]]:
        size = block.stop - block.start
        cuts = [slice(at, min(at + width, size)) for at in range(0, size, width)]
        with self._file() as file:
            for row, member in enumerate(chosen):
                elements = self._decode(member, number)
                for cut in cuts:
                    # All rows of a part lie together, so that reading it is one run.
                    file.seek(4 * (cut.start * len(chosen) + row * (cut.stop - cut.start)))
                    file.write(elements[cut].tobytes())
            file.seek(0)
            for cut in cuts:
                shape = len(chosen), cut.stop - cut.start
                rows = np.fromfile(file, np.float32, shape[0] * shape[1]).reshape(shape)
                yield slice(block.start + cut.start, block.start + cut.stop), rows

    @contextlib.contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        try:
            with tempfile.TemporaryFile(dir=self.scratch) as file:
                yield file
        except OSError as error:
            raise LedgerError(
                f"{self.scratch}: the updates of a round cannot be laid out there ({error.strerror}); make room"
            ) from error

    def _decode(self, member: int, number: int) -> Vector:
        elements = UpdateReader(self.load(member), self.layouts).block(self.name, number)
        scale = self.reports[member].scale
        if scale != 1.0:
            elements *= np.float32(scale)
        return elements
