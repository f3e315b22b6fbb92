"""Vectors that a device remembers from one task to the next, as bytes for its store.

Format, version 1
-----------------
====================  ====================================================
``0x01``              version
8 bytes               the first of the layout's SHA-256 (``Layout.digest``)
float32 a parameter   little-endian
====================  ====================================================
"""

import math

import numpy as np

from edge_client.codec.integers import Reader
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import peak
from edge_client.errors import CodecError

VERSION = 1
_DIGEST = 8


def pack_vector(vector: Vector, layout: Layout) -> bytes:
    """``vector`` (``[layout.size] float32``, finite) for the store.

    Raises:
        CodecError: it does not fit the layout, or is not finite.
    """
    layout.check(vector)
    if not math.isfinite(peak(vector)):
        raise CodecError("vector holds NaN or infinite values; expected finite ones: forget it")
    return bytes([VERSION]) + layout.digest[:_DIGEST] + vector.astype("<f4", copy=False).tobytes()


def unpack_vector(data: bytes, layout: Layout) -> Vector:
    """What `pack_vector` was given, ``[layout.size] float32``, new.

    Raises:
        CodecError: the bytes are damaged, or of another layout.
    """
    reader = Reader(data, "remembered vector")
    if (found := reader.take(1)[0]) != VERSION:
        raise CodecError(f"remembered vector has format version {found}; expected {VERSION}: forget it")
    if bytes(reader.take(_DIGEST)) != layout.digest[:_DIGEST]:
        raise CodecError("remembered vector belongs to another layout of the parameters: forget it")
    vector = np.frombuffer(reader.take(4 * layout.size), "<f4").astype(np.float32)
    reader.end()
    if not math.isfinite(peak(vector)):
        raise CodecError("remembered vector holds NaN or infinite values; expected finite ones: forget it")
    return vector
