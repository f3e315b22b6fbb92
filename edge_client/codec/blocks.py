"""The layout cut into blocks: what is encoded, decoded and read at once, whatever the size of the model.

The cut follows from the layout alone, so no byte tells it. Tensors are laid in a block as long as it has room. A tensor
of more than ``BLOCK`` elements is cut into parts of as many whole rows as fit, one with longer rows into runs of
``BLOCK`` elements.

The bytes are *blocks* in ``FORMAT.md``: any of them can be read without a look at the others.
"""

import functools
from dataclasses import dataclass

from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, TensorSpec

BLOCK = 1 << 22
"""Most elements in a block. Statistics of their own cost each block some hundred bytes, its elements some tens of
kilobytes; coding one takes some ten times its elements in scratch memory."""


@dataclass(frozen=True)
class Block:
    """Elements ``start`` to ``stop`` of the flat vector, with ``layout`` for its tensors and parts of tensors."""

    start: int
    stop: int
    layout: Layout

    @property
    def where(self) -> slice:
        """The block's place in the flat vector."""
        return slice(self.start, self.stop)


@functools.lru_cache(maxsize=32)
def blocks(layout: Layout, limit: int = BLOCK) -> tuple[Block, ...]:
    """The blocks of a layout, in order, none empty."""
    found: list[Block] = []
    parts: list[TensorSpec] = []
    start, filled = 0, 0
    for part in (part for tensor in layout.tensors for part in _parts(tensor, limit)):
        if filled and filled + part.size > limit:
            found.append(Block(start, start + filled, Layout(tuple(parts))))
            start, filled, parts = start + filled, 0, []
        parts.append(part)
        filled += part.size
    if filled:
        found.append(Block(start, start + filled, Layout(tuple(parts))))
    return tuple(found)


def join(bodies: list[bytes]) -> bytes:
    """The blocks' bytes as one run."""
    return b"".join([*(varint(len(body)) for body in bodies[:-1]), *bodies])


def split(reader: Reader, layout: Layout) -> list[memoryview]:
    """Each block's bytes, from a reader of what `join` made, to its end.

    Raises:
        CodecError: there are not so many bytes.
    """
    count = len(blocks(layout))
    lengths = [reader.varint(2**34) for _ in range(count - 1)]
    bodies = [reader.take(length) for length in lengths]
    if count:
        bodies.append(reader.rest())
    reader.end()
    return bodies


def _parts(tensor: TensorSpec, limit: int) -> list[TensorSpec]:
    if tensor.size <= limit:
        return [tensor]
    rows, columns = tensor.matrix
    if columns > limit:
        rows, columns = tensor.size, 1
    each = limit // columns
    shape: tuple[int, ...] = tensor.shape[1:] if columns > 1 else ()
    return [TensorSpec(tensor.name, (min(each, rows - at), *shape)) for at in range(0, rows, each)]
