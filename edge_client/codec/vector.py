"""One vector in few bytes: block after block, what is low-rank as factors, the rest element by element.

All of it is quantized with one step, which spends each bit where it saves most (reverse water-filling).

The bytes are a *quantized vector* in ``FORMAT.md``.
"""

import math
import struct
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edge_client.codec.blocks import Block, blocks, join, split
from edge_client.codec.entropy import decode_levels, encode_levels
from edge_client.codec.integers import Reader, pack, section, unpack
from edge_client.codec.layout import Layout, TensorSpec, Vector
from edge_client.codec.lowrank import Coefficients, Factors, Matrix, Sketch, factorize, floor, most, sketch, suits
from edge_client.codec.quantize import LEVEL_LIMIT, Quantized, centroids, peak, quantize, rms
from edge_client.errors import CodecError

_DEAD_ZONE = 0.7
"""In steps, where few elements are told; narrower where many are, by up to ``_NARROWER``, as an entropy-coded scalar
quantizer wants it: both for Gaussian and for Laplacian elements."""
_NARROWER, _MANY, _MOST = 0.15, 0.2, 0.45
_Integer = TypeVar("_Integer", bound=np.signedinteger)
_STEP = struct.Struct("<f")
_OFFSETS = struct.Struct("<3b")


class VectorEncoder:
    """Encodes one vector (``[layout.size] float32``, finite, not all zero), at as many steps as rate control tries.

    ``data`` and ``residual`` are what the last call of `encode` made; ``residual`` is what the bytes leave out.
    """

    def __init__(self, vector: Vector, layout: Layout) -> None:
        self._vector = vector
        self._blocks = blocks(layout)
        self._sketches: dict[tuple[int, int], tuple[float, Sketch]] = {}
        highest = peak(vector)
        wide = 1e-15 < highest < 1e15
        self.rms = rms(vector if wide else vector.astype(np.float64))
        # float32 products of what is larger or smaller would overflow or vanish.
        self._factors = 1e-12 < highest < 1e12
        self.bounds = highest / LEVEL_LIMIT, highest
        """Least and largest step: at the largest at least one value is told, so that error feedback always gets rid of
        something; below the least a level would pass ``LEVEL_LIMIT``."""
        self.residual = np.empty_like(vector)
        self.data = b""
        self.step = 0.0

    def encode(self, step: float, *, silent: bool = False) -> bytes:
        """Encode at a step, which is taken into ``bounds`` and to float32.

        ``silent``: it may be larger than that, and then perhaps nothing is told.
        """
        self.step = self._allowed(step, silent=silent)
        bodies = [self._block(block, code=True) for block in self._blocks]
        self.data = _STEP.pack(self.step) + join(bodies)
        return self.data

    def noise(self, step: float) -> float:
        """Energy of what encoding at ``step`` would leave out, as a share of the vector's; nothing is encoded."""
        self.step = self._allowed(step)
        for block in self._blocks:
            self._block(block, code=False)
        return (rms(self.residual) / self.rms) ** 2

    def _allowed(self, step: float, *, silent: bool = False) -> float:
        low, high = self.bounds
        step = max(step, low) if silent else min(max(step, low), high)
        return float(np.float32(max(step, 1e-45)))

    def _block(self, block: Block, *, code: bool) -> bytes:
        left = self.residual[block.where]
        left[:] = self._vector[block.where]
        parts = _suitable(block)
        found = [
            self._factorize((block.start, number), left[where].reshape(part.matrix))
            for number, (part, where) in enumerate(parts)
        ]
        factors = [one for one in found if one is not None]
        moved = (
            centroids(
                np.concatenate([fitted.ravel() for _, fitted in factors]),
                np.concatenate([one.right.ravel() for one, _ in factors]),
            )
            if factors
            else (0, 0, 0)
        )
        for (part, where), one in zip(parts, found, strict=True):
            if one is not None:
                matrix = left[where].reshape(part.matrix)
                for rows, product in one[0].product(self.step, moved):
                    matrix[rows] -= product
        quantized = quantize(left, self.step, _DEAD_ZONE)
        told = len(quantized.index) / len(left)
        if told > _MANY:
            narrower = _DEAD_ZONE - _NARROWER * min(1.0, (told - _MANY) / (_MOST - _MANY))
            quantized = quantize(left, self.step, narrower)
        quantized.add(left, -1.0)
        if not code:
            return b""
        head = [_OFFSETS.pack(*quantized.offsets)]
        ranks = np.array([one[0].rank if one else 0 for one in found], np.uint32)
        index, level = [quantized.index], [quantized.level]
        if parts:
            head.append(section(pack(ranks)))
        if factors:
            head.append(_OFFSETS.pack(*moved))
        start = block.layout.size
        for side in (side for one, _ in factors for side in (one.left, one.right)):
            at = np.flatnonzero(side)
            index.append(at + start)
            level.append(side.ravel()[at])
            start += side.size
        del quantized
        return b"".join([*head, encode_levels(_joined(index), _joined(level), _told(block, ranks))])

    def _factorize(self, key: tuple[int, int], matrix: Matrix) -> tuple[Factors, Coefficients] | None:
        if not self._factors:
            return None
        least = floor(matrix.shape, self.step)
        known = self._sketches.get(key)
        if known is None or least < known[0]:
            least *= 0.8  # rate control will try smaller steps too
            known = self._sketches[key] = (least, sketch(matrix, least))
        return factorize(matrix, known[1], self.step)


def decode_vector(data: memoryview, layout: Layout, what: str) -> Vector:
    """Decode a whole vector: ``[layout.size] float32``.

    Raises:
        CodecError: the bytes are not a quantized vector of this layout.
    """
    vector = np.zeros(layout.size, np.float32)
    step, parts = _split(data, layout, what)
    for block, part in zip(blocks(layout), parts, strict=True):
        _decode_block(part, block, step, vector[block.where], what)
    return vector


def decode_block(data: memoryview, layout: Layout, number: int, what: str) -> Vector:
    """Decode one of the layout's `blocks` without a look at the others: ``[block.stop - block.start] float32``.

    Raises:
        CodecError: the bytes are not a quantized vector of this layout.
    """
    block = blocks(layout)[number]
    step, parts = _split(data, layout, what)
    vector = np.zeros(block.stop - block.start, np.float32)
    _decode_block(parts[number], block, step, vector, what)
    return vector


def _split(data: memoryview, layout: Layout, what: str) -> tuple[float, list[memoryview]]:
    """The step, and each block's bytes."""
    reader = Reader(data, what)
    (step,) = _STEP.unpack(reader.take(_STEP.size))
    if not 0 < step < math.inf:
        raise CodecError(f"{what} has step {step}; expected a positive finite number: fetch it again")
    return step, split(reader, layout)


def _decode_block(data: memoryview, block: Block, step: float, out: Vector, what: str) -> None:
    reader = Reader(data, what)
    offsets = _OFFSETS.unpack(reader.take(_OFFSETS.size))
    suitable = _suitable(block)
    ranks = np.zeros(0, np.uint32)
    if suitable:
        ranks = unpack(reader.section(), len(suitable), what)
        for rank, (part, _) in zip(ranks.tolist(), suitable, strict=True):
            if rank > most(part.matrix):
                raise CodecError(
                    f"{what} is corrupt: tensor {part.name!r} has rank {rank}; expected at most {most(part.matrix)}"
                )
    moved = _OFFSETS.unpack(reader.take(_OFFSETS.size)) if ranks.any() else (0, 0, 0)
    index, level = decode_levels(reader.rest(), _told(block, ranks), what)
    if ranks.any():
        size = block.layout.size
        inside = index < size
        dense = np.zeros(_told(block, ranks).size - size, np.int32)
        dense[index[~inside] - size] = level[~inside]
        index, level = index[inside], level[inside]
        start = 0
        for rank, (part, where) in zip(ranks.tolist(), suitable, strict=True):
            if not rank:
                continue
            matrix = out[where].reshape(part.matrix)
            sides = []
            for length in part.matrix:
                sides.append(dense[start : start + length * rank].reshape(length, rank))
                start += length * rank
            factors = Factors(sides[0], sides[1])
            if not factors.exact:
                raise CodecError(f"{what} is corrupt: factors of {part.name!r} are out of range; fetch it again")
            for rows, product in factors.product(step, moved):
                matrix[rows] = product
    with np.errstate(over="ignore"):
        Quantized(step, offsets, index, level).add(out)


def _joined(arrays: list[npt.NDArray[_Integer]]) -> npt.NDArray[_Integer]:
    """All of them end to end; the list is left empty, so that they do not stay beside it."""
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    arrays.clear()
    return whole


def _suitable(block: Block) -> list[tuple[TensorSpec, slice]]:
    return [(part, where) for part, where in block.layout.slices() if suits(part.matrix)]


def _told(block: Block, ranks: npt.NDArray[np.uint32]) -> Layout:
    """The block's parts and the factors of those with a rank, as the levels see them."""
    shapes = [
        (length, rank)
        for rank, (part, _) in zip(ranks.tolist(), _suitable(block), strict=True)
        if rank
        for length in part.matrix
    ]
    return Layout((*block.layout.tensors, *(TensorSpec("", shape) for shape in shapes)))
