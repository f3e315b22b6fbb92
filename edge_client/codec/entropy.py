"""Sparse integer vectors in few bytes: context classes by row and column activity, gaps, magnitudes and signs.

Model updates are mostly zero after quantization, and their non-zeros cluster: whole units (rows) and inputs (columns)
are active or not. Each matrix is seen as ``[out, rest]``. A row with ``r`` non-zeros and a column with ``c`` in a
tensor with ``t`` of them cross in a non-zero with probability about ``r * c / t`` (the maximum likelihood of a rank-1
Poisson model). That expectation, on a logarithmic scale, is the element's class; the elements of one class, from all
tensors, form one *stream* with its own statistics. Rows and columns without any non-zero cost nothing beyond their
class. In a stream, the gaps between non-zeros are coded instead of the zeros: the same entropy, and the coder's time
goes with the non-zeros. The bytes are *levels* in ``FORMAT.md``.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_client.codec.integers import Integers, Reader, pack, pieces, section, unpack, varint
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError

Indices = npt.NDArray[np.int64]
Levels = npt.NDArray[np.int32]
Places = npt.NDArray[np.int32]
Magnitudes = npt.NDArray[np.float64]

ROWS, COLUMNS = 1, 2
CLASSES = 64
STREAM_BITS = 100
"""What one more stream costs, about: two lists' headers and histograms."""
LIST_BITS = 100
"""What one more list of classes costs before its content."""


# The least count of each class but the first: cls(c) >= k exactly when c * c >= 2^(k - 1).
_FLOORS = np.array([math.isqrt(2 ** (k - 1) - 1) + 1 if k > 1 else 1 for k in range(1, CLASSES)], np.int64)


def activity(sums: npt.NDArray[np.number] | float) -> Indices:
    """``cls`` of each sum of magnitudes (any shape)."""
    return np.searchsorted(_FLOORS, sums, side="right")


@dataclass(frozen=True)
class _Grid:
    """One tensor with non-zeros: the classes of its rows and columns, and the blocks that they cut it into."""

    start: int
    mode: int
    total: int
    rows: Indices
    columns: Indices

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def offset(self) -> int:
        """What the classes of a row and a column are above the logarithm of their expectation."""
        rows, columns = self.shape
        if self.mode == 0:
            return int(activity(rows * columns)) - self.total
        return (0, int(activity(columns)), int(activity(rows)), self.total)[self.mode]

    def sides(self) -> list[tuple[int, Indices]]:
        return [(ROWS, self.rows), (COLUMNS, self.columns)]


@dataclass(frozen=True)
class _Streams:
    """Where each block of each grid lies when all streams are laid end to end.

    ``base`` ``[blocks]``: position of the block's first element, ascending; ``grid``, ``row``, ``column``, ``width``:
    its grid, the place of its first row and column in the grid's class order, and its columns. ``ends`` ``[streams]``:
    where each stream ends.
    """

    base: Indices
    grid: Indices
    row: Indices
    column: Indices
    width: Indices
    ends: Indices


def _blocks(grids: list[_Grid]) -> tuple[Indices, ...]:
    """Blocks by grid and classes, as columns of one table.

    They are: expectation, grid, row class, column class, first row, first column, height, width.
    """
    parts: list[tuple[Indices, ...]] = []
    for number, grid in enumerate(grids):
        edges = []
        for side, classes in grid.sides():
            count = np.bincount(classes, minlength=CLASSES)
            first = np.cumsum(count) - count
            if grid.mode & side:
                count[0] = 0
            present = np.flatnonzero(count)
            edges.append((present, first[present], count[present]))
        (a, row, height), (b, column, width) = edges
        wide, high = len(b), len(a)
        parts.append(
            (
                (a[:, None] + b[None, :]).ravel() - grid.offset,
                np.full(wide * high, number, np.int64),
                np.repeat(a, wide),
                np.tile(b, high),
                np.repeat(row, wide),
                np.tile(column, high),
                np.repeat(height, wide),
                np.tile(width, high),
            )
        )
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _streams(blocks: tuple[Indices, ...], edges: Indices) -> tuple[_Streams, Indices]:
    """Lay the blocks out; also the order that sorts them by stream."""
    expectation, grid, _, _, row, column, height, width = blocks
    stream = np.searchsorted(edges, expectation, side="right")
    order = np.argsort(stream, kind="stable")
    size = (height * width)[order]
    stop = np.cumsum(size)
    ends = np.append(0, stop)[np.searchsorted(stream[order], np.arange(len(edges) + 1), side="right")]
    return _Streams(stop - size, grid[order], row[order], column[order], width[order], ends), order


def _entropy(size: npt.NDArray[np.number], mass: npt.NDArray[np.number]) -> Magnitudes:
    """Bits of ``size`` geometric magnitudes that sum to ``mass``, elementwise: what a stream costs but for signs."""
    n, s = size.astype(np.float64), mass.astype(np.float64)
    bits: Magnitudes = (n + s) * np.log2(np.maximum(n + s, 1)) - n * np.log2(np.maximum(n, 1))
    bits -= s * np.log2(np.maximum(s, 1))
    return bits


def _list_bits(values: Indices) -> float:
    count = np.bincount(values)
    count = count[count > 0]
    return float(-(count * np.log2(count / len(values))).sum()) + LIST_BITS


def _sums(at: Places, magnitude: Integers, length: int) -> Magnitudes:
    """Sum of the magnitudes at each of ``length`` places: ``numpy.bincount``, but for its copies of 16 bytes each."""
    sums = np.zeros(length)
    for piece in pieces(0, len(at), length):
        sums += np.bincount(at[piece], magnitude[piece], length)
    return sums


def _choose_grid(tensor: TensorSpec, start: int, index: Indices, magnitude: Integers) -> _Grid:
    """The mode of least estimated cost for the magnitudes at ``index`` of one tensor, which begins at ``start``."""
    n_rows, n_columns = tensor.matrix
    mass = float(magnitude.sum(dtype=np.float64))
    total = int(activity(mass))
    flat = [np.zeros(n, np.int64) for n in (n_rows, n_columns)]
    best = _Grid(start, 0, total, *flat)
    if n_rows < 2:
        return best
    least = float(_entropy(np.array(tensor.size), np.array(mass)))
    column = (index - start).astype(np.int32)
    row = column // np.int32(n_columns)
    column -= row * np.int32(n_columns)
    sides = [activity(_sums(at, magnitude, n)) for at, n in ((row, n_rows), (column, n_columns))]
    lists = [_list_bits(side) for side in sides]
    for mode in (ROWS, COLUMNS, ROWS | COLUMNS):
        cost = sum(bits for side, bits in zip((ROWS, COLUMNS), lists, strict=True) if mode & side)
        if cost >= least:
            continue
        a = sides[0] if mode & ROWS else flat[0]
        b = sides[1] if mode & COLUMNS else flat[1]
        sums = np.zeros(2 * CLASSES)
        for piece in pieces(0, len(row)):
            sums += np.bincount(a[row[piece]] + b[column[piece]], magnitude[piece], 2 * CLASSES)
        heights, widths = np.bincount(a), np.bincount(b)
        if mode & ROWS:
            heights[0] = 0
        if mode & COLUMNS:
            widths[0] = 0
        sizes = np.convolve(heights, widths)
        cost += float(_entropy(sizes, sums[: len(sizes)]).sum())
        if cost < least:
            least, best = cost, _Grid(start, mode, total, a, b)
    return best


def _choose_edges(expectation: Indices, size: Indices, mass: npt.NDArray[np.number]) -> Indices:
    """Edges between streams: neighbouring expectations share one where telling them apart would not pay."""
    values, group = np.unique(expectation, return_inverse=True)
    sizes, sums = np.bincount(group, size), np.bincount(group, mass)
    keep = np.ones(len(values), bool)
    while len(sizes) > 1:
        merged = _entropy(sizes[:-1] + sizes[1:], sums[:-1] + sums[1:])
        each = _entropy(sizes, sums)
        loss = merged - each[:-1] - each[1:]
        at = int(np.argmin(loss))
        if loss[at] > STREAM_BITS:
            break
        for totals in (sizes, sums):
            totals[at] += totals[at + 1]
        sizes, sums = np.delete(sizes, at + 1), np.delete(sums, at + 1)
        keep[np.flatnonzero(keep)[at + 1]] = False
    return values[keep][1:]


def _order(classes: Indices) -> Indices:
    """Rows or columns sorted by class, then by number."""
    return np.argsort(classes.astype(np.uint8), kind="stable")


def _ranks(classes: Indices) -> Indices:
    """Place of each row or column among those of its class."""
    order = _order(classes)
    count = np.bincount(classes)
    ranks = np.empty(len(classes), np.int64)
    ranks[order] = np.arange(len(classes)) - (np.cumsum(count) - count)[classes[order]]
    return ranks


def encode_levels(index: Indices, level: Levels, layout: Layout) -> bytes:
    """Encode a sparse integer vector.

    Args:
        index: ``[m] int64``, ascending places of the non-zeros in the layout's flat vector.
        level: ``[m] int32``, their values, none zero.
        layout: the tensors that the flat vector holds; it may have up to 2^31 - 1 elements.
    """
    if len(index) == 0:
        return varint(0)
    magnitude = np.abs(level).view(np.uint32)
    grids, spans, modes = [], [], np.zeros(len(layout.tensors), np.uint32)
    for number, (tensor, where) in enumerate(layout.slices()):
        low, high = np.searchsorted(index, (where.start, where.stop)).tolist()
        if low < high:
            grid = _choose_grid(tensor, where.start, index[low:high], magnitude[low:high])
            modes[number] = 4 * grid.total + grid.mode
            grids.append(grid)
            spans.append((low, high))
    blocks = _blocks(grids)
    expectation, owner, a, b, _, _, height, width = blocks
    block, within = np.empty(len(index), np.int32), np.empty(len(index), np.int32)
    for number, (grid, (low, high)) in enumerate(zip(grids, spans, strict=True)):
        mine = np.flatnonzero(owner == number)
        if grid.mode == 0:
            # One block in the tensor's own order. Ranks would take 60 bytes for each row and column.
            block[low:high] = mine[0]
            np.subtract(index[low:high], grid.start, out=within[low:high], casting="same_kind")
            continue
        table = np.zeros((CLASSES, CLASSES), np.int64)
        table[a[mine], b[mine]] = mine
        ranks = _ranks(grid.rows), _ranks(grid.columns)
        for piece in pieces(low, high):
            row, column = np.divmod((index[piece] - grid.start).astype(np.int32), np.int32(grid.shape[1]))
            found = table[grid.rows[row], grid.columns[column]]
            block[piece] = found
            within[piece] = ranks[0][row] * width[found] + ranks[1][column]
    edges = _choose_edges(expectation, height * width, _sums(block, magnitude, len(owner)))
    del index, magnitude  # where most elements are told, each of them is as large as the vector
    streams, order = _streams(blocks, edges)
    base = np.empty(len(order), np.int64)
    base[order] = streams.base
    # Sorting value and place as one integer is several times faster than an argsort.
    keys = base[block]
    keys += within
    keys <<= 32
    keys |= level.view(np.uint32)
    del block, within
    keys.sort()
    level = keys.astype(np.uint32).view(np.int32)
    magnitude = np.abs(level).view(np.uint32)
    position = np.right_shift(keys, 32, out=keys)
    parts = [varint(len(level)), section(pack(modes))]
    for grid in grids:
        parts += [section(pack(side.astype(np.uint32))) for bit, side in grid.sides() if grid.mode & bit]
    parts += [varint(len(edges)), bytes((edges + 128).tolist())]
    begin, low = 0, 0
    for end in streams.ends.tolist():
        high = int(np.searchsorted(position, end))
        dense = 2 * (high - low) > end - begin
        parts.append(varint(2 * (high - low) + dense))
        if dense:
            values = np.zeros(end - begin, np.uint32)
            values[position[low:high] - begin] = magnitude[low:high]
            parts.append(section(pack(values)))
        elif high > low:
            gaps = np.diff(position[low:high], prepend=begin - 1) - 1
            parts += [section(pack(gaps.astype(np.uint32))), section(pack(magnitude[low:high] - np.uint32(1)))]
        begin, low = end, high
    parts.append(section(np.packbits(level < 0).tobytes()))
    return b"".join(parts)


def decode_levels(data: bytes | memoryview, layout: Layout, what: str = "update") -> tuple[Indices, Levels]:
    """Decode what ``encode_levels`` wrote: places (``[m] int64``, each once, in no order) and values (``[m] int32``,
    none zero).

    Memory stays in proportion to the layout, whatever the bytes claim.

    Raises:
        CodecError: the bytes are not an integer vector of this layout.
    """
    reader = Reader(data, what)
    count = reader.varint(layout.size)
    if count == 0:
        reader.end()
        return np.empty(0, np.int64), np.empty(0, np.int32)
    grids = _read_grids(reader, layout)
    n_edges = reader.varint(255)
    edges = np.frombuffer(reader.take(n_edges), np.uint8).astype(np.int64) - 128
    if not grids or bool((np.diff(edges) <= 0).any()):
        raise CodecError(f"{what} is corrupt: its streams are not in order; fetch it again")
    streams, _ = _streams(_blocks(grids), edges)
    position, magnitude = _read_streams(reader, streams.ends, count)
    signs = reader.section()
    reader.end()
    if len(signs) != (count + 7) // 8:
        raise CodecError(f"{what} is corrupt: {len(signs)} bytes of signs for {count} values; fetch it again")
    level = magnitude.view(np.int32)
    np.negative(level, out=level, where=np.unpackbits(np.frombuffer(signs, np.uint8), count=count).view(bool))
    return _locate(position, streams, grids), level


def _read_grids(reader: Reader, layout: Layout) -> list[_Grid]:
    slices = layout.slices()
    modes = unpack(reader.section(), len(slices), reader.what)
    grids = []
    for (tensor, where), word in zip(slices, modes.tolist(), strict=True):
        total, mode = word >> 2, word & 3
        n_rows, n_columns = tensor.matrix
        if word == 0:
            continue
        if not 0 < total < CLASSES or tensor.size == 0 or (mode and n_rows < 2):
            raise CodecError(f"{reader.what} is corrupt: tensor {tensor.name!r} has impossible classes; fetch it again")
        sides = []
        for bit, size in ((ROWS, n_rows), (COLUMNS, n_columns)):
            side = (
                unpack(reader.section(), size, reader.what).astype(np.int64) if mode & bit else np.zeros(size, np.int64)
            )
            if int(side.max()) >= CLASSES:
                raise CodecError(
                    f"{reader.what} is corrupt: class {int(side.max())} in tensor {tensor.name!r}; fetch it again"
                )
            sides.append(side)
        grids.append(_Grid(where.start, mode, total, *sides))
    return grids


def _read_streams(reader: Reader, ends: Indices, count: int) -> tuple[Indices, npt.NDArray[np.uint32]]:
    """Positions (``[count] int64``, ascending) and magnitudes (``[count] uint32``, none zero) of all streams."""
    position = np.empty(count, np.int64)
    magnitude = np.empty(count, np.uint32)
    begin, low = 0, 0
    for end in ends.tolist():
        word = reader.varint(2 * min(end - begin, count - low) + 1)
        dense, high = word & 1, low + (word >> 1)
        if high > count:
            raise CodecError(f"{reader.what} is corrupt: more values than the {count} that it tells; fetch it again")
        if dense:
            values = unpack(reader.section(), end - begin, reader.what)
            found = np.flatnonzero(values)
            if len(found) != high - low:
                raise CodecError(
                    f"{reader.what} is corrupt: {len(found)} values in a stream of {high - low}; fetch it again"
                )
            np.add(found, begin, out=position[low:high])
            magnitude[low:high] = values[found]
        elif high > low:
            gaps = unpack(reader.section(), high - low, reader.what)
            np.add(unpack(reader.section(), high - low, reader.what), 1, out=magnitude[low:high])
            # Below 2^31 gaps of below 2^32 each, the sum stays in 63 bits.
            np.cumsum(gaps + np.int64(1), out=position[low:high])
            position[low:high] += begin - 1
            if position[high - 1] >= end:
                raise CodecError(f"{reader.what} is corrupt: a value lies past the end of its stream; fetch it again")
        begin, low = end, high
    if low != count or not 0 < int(magnitude.min()) <= int(magnitude.max()) < 2**31:
        raise CodecError(
            f"{reader.what} is corrupt: its {count} values are not all there or out of range; fetch it again"
        )
    return position, magnitude


def _locate(position: Indices, streams: _Streams, grids: list[_Grid]) -> Indices:
    """Turn positions in the streams into places in the flat vector, where they are."""
    orders = [(_order(grid.rows), _order(grid.columns)) for grid in grids]
    shapes = np.array([(grid.start, *grid.shape) for grid in grids], np.int64)
    rows = np.concatenate([row for row, _ in orders])
    columns = np.concatenate([column for _, column in orders])
    first = np.cumsum(shapes[:, 1:], axis=0) - shapes[:, 1:]
    for piece in pieces(0, len(position)):
        found = position[piece]
        block = np.searchsorted(streams.base, found, side="right") - 1
        row, column = np.divmod(found - streams.base[block], streams.width[block])
        grid = streams.grid[block]
        row += streams.row[block] + first[grid, 0]
        column += streams.column[block] + first[grid, 1]
        position[piece] = shapes[grid, 0] + rows[row] * shapes[grid, 2] + columns[column]
    return position
