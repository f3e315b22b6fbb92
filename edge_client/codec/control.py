"""The server's control variate (c of SCAFFOLD), which travels with a version of the model: float32 or quantized.

The bytes are a *control* in ``FORMAT.md``; no bytes are a vector of zeros.
"""

import math

import numpy as np

from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import peak
from edge_client.codec.vector import decode_vector
from edge_client.errors import CodecError

_RAW, _QUANTIZED = 2, 3
_HEADS = 1024
"""Bytes that a quantized vector of few elements may have more than their floats."""


def raw_control(vector: Vector) -> bytes:
    """A control as it is, of ``[n] float32``, finite."""
    return bytes([_RAW]) + vector.astype("<f4", copy=False).tobytes() if vector.any() else b""


def coded_control(code: bytes) -> bytes:
    """A control that is told by the bytes of a quantized vector; by none where it is zero."""
    return bytes([_QUANTIZED]) + code if code else b""


def check_control(data: bytes, layout: Layout, what: str) -> None:
    """Look at its kind and its length; a quantized one is decoded when it is needed.

    Raises:
        CodecError: it cannot be a control of this layout.
    """
    if data and data[0] not in (_RAW, _QUANTIZED):
        raise CodecError(f"{what} has a control of kind {data[0]}; expected {_RAW} or {_QUANTIZED}: fetch it again")
    if data[:1] == bytes([_RAW]) and len(data) != 1 + 4 * layout.size:
        raise CodecError(f"{what} has a control of {len(data)} bytes; expected {1 + 4 * layout.size}: other bundle?")
    # Nobody may look inside for long, and devices keep what they are sent.
    if len(data) > (most := 1 + 4 * layout.size + _HEADS):
        raise CodecError(f"{what} has a control of {len(data)} bytes; expected at most {most}: other bundle?")


def decode_control(data: bytes, layout: Layout) -> Vector | None:
    """What it stands for, ``[layout.size] float32``, new; None is zeros.

    Raises:
        CodecError: the bytes are damaged, of another layout, or hold what is not finite.
    """
    if not data:
        return None
    check_control(data, layout, "model")
    body = memoryview(data)[1:]
    vector = np.frombuffer(body, "<f4").astype(np.float32) if data[0] == _RAW else decode_vector(body, layout, "model")
    if not math.isfinite(peak(vector)):
        raise CodecError("model is corrupt: its control holds NaN or infinite values; fetch it again")
    return vector
