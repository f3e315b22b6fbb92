"""Error feedback: what an update leaves out is kept on the device, and goes with the next one (Seide et al. 2014).

Without it a coarse code says the same large values each time and never the small ones; with it everything is said in
the end (Karimireddy et al. 2019). Between tasks a residual rests on flash in one byte a parameter. A client that comes
once has no next one; its updates can be made as long as what was learned (`lengthening`).

Format, version 2
-----------------
====================  ================================================================================================
``0x02``              version
8 bytes               the first of the layout's SHA-256 (``Layout.digest``)
varint                version of the model that the update was trained from
``top``               float32, little-endian: the largest magnitude
one int8 a parameter  ``u``; the value is ``sign(u) * (u / 127)^2 * top``
====================  ================================================================================================

Squares, because a residual has many small values and few large ones, the more so the fewer bits its update had: the
noise of this rounding, which nothing makes up for, is at most a thousandth of the residual's energy at any rate, where
even steps lost up to 6 % of it on slow links, and whole layers of small values with it.
"""

import math
import struct

import numpy as np

from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import rms
from edge_client.errors import CodecError

VERSION = 2
_DIGEST = 8
_TOP = struct.Struct("<f")
_BLOCK = 1 << 18
_LONGEST = 2.0
"""Most that an update is lengthened by: of one that says less than a quarter of the energy, too little is known."""


def pack_residual(residual: Vector, layout: Layout, version: int) -> bytes:
    """A residual for the store; no bytes where nothing is left over.

    Args:
        residual: ``[layout.size] float32``, finite.
        layout: that of the parameters.
        version: the version of the model that the update was trained from.

    Raises:
        CodecError: the residual does not fit the layout, or is not finite.
    """
    layout.check(residual)
    top = float(max(residual.max(initial=0), -residual.min(initial=0)))
    if not math.isfinite(top):
        raise CodecError("residual holds NaN or infinite values; expected finite ones: drop it and start from zero")
    if top == 0:
        return b""
    units = np.empty(residual.size, np.int8)
    for at in range(0, residual.size, _BLOCK):
        # Divided in float64: the smallest float32 would overflow, and one block of it is little.
        part = residual[at : at + _BLOCK] / np.float64(top)
        units[at : at + _BLOCK] = np.copysign(np.rint(np.sqrt(np.abs(part)) * 127), part)
    head = bytes([VERSION]) + layout.digest[:_DIGEST] + varint(version) + _TOP.pack(top)
    return head + units.tobytes()


def add_residual(vector: Vector, data: bytes, layout: Layout, version: int) -> None:
    """Add what `pack_residual` wrote to ``vector`` (``[layout.size] float32``), in place.

    Raises:
        CodecError: the bytes are damaged, belong to another layout, or to a later version of the model than
            ``version``, so that the server has gone back since; the vector is then as it was.
    """
    layout.check(vector)
    reader = Reader(data, "residual")
    if (found := reader.take(1)[0]) != VERSION:
        raise CodecError(f"residual has format version {found}; expected {VERSION}: drop it and start from zero")
    if bytes(reader.take(_DIGEST)) != layout.digest[:_DIGEST]:
        raise CodecError("residual belongs to another layout of the parameters: drop it and start from zero")
    since = reader.varint(2**35 - 1)
    (top,) = _TOP.unpack(reader.take(_TOP.size))
    units = np.frombuffer(reader.take(layout.size), np.int8)
    reader.end()
    if since > version:
        raise CodecError(f"residual is of model version {since}; the model is at {version} again: drop it")
    if not 0 < top < math.inf:
        raise CodecError(f"residual is corrupt: its largest magnitude is {top}; drop it and start from zero")
    values = np.arange(-127, 128, dtype=np.float64)
    table = (values * np.abs(values) * (top / 127**2)).astype(np.float32)
    for at in range(0, vector.size, _BLOCK):
        vector[at : at + _BLOCK] += table[np.maximum(units[at : at + _BLOCK], -127).astype(np.intp) + 127]


def lengthening(delta: Vector, residual: Vector) -> float:
    """What to multiply ``delta`` by so that what is told of it has the length that ``delta`` has, at most 2.

    A coarse code only ever shortens: its levels are means, so what it leaves out is missing from the length. The mean
    over a cohort is then too short as well, and what many clients leave out is not made up for by anyone. To restore
    the length is half way to an unbiased update (which divides by the share of the energy that is told, as EDEN of
    Vargaftik et al. 2022 does), and the better half: its noise grows less.

    Args:
        delta: ``[n] float32``, finite.
        residual: what its encoding left out, ``[n] float32``.
    """
    learned, told = rms(delta), rms(delta - residual)
    return min(_LONGEST, max(1.0, learned / told)) if told > 0 and math.isfinite(learned) else 1.0
