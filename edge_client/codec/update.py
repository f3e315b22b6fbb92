"""What a client sends after training: named vectors and named scalars in one run of bytes.

Byte format, version 1
----------------------
======================  ==============================================================================================
``FU``                  two bytes of magic
``0x01``                version
varint                  length of the header, at most 16384
header                  MessagePack array of three: the layouts' digest (8 bytes binary), the scalars (map of name to
                        integer or float), the vectors (map of name, ascending, to an array ``[kind, length]``)
payload                 each vector's ``length`` bytes, in the order of the map, and nothing after
======================  ==============================================================================================

The layouts' digest is the first 8 bytes of SHA-256 over, for each vector in ascending order of its name: the name in
UTF-8, a 0 byte, the layout's SHA-256 (``Layout.digest``). Integers and varints are as in ``integers``.

====  ===========  ===================================================================================================
kind  name         payload
====  ===========  ===================================================================================================
0     zero         none: all values are 0
1     non-finite   none: the vector held a NaN or an infinity; it decodes to NaN throughout
2     raw          float32, little-endian, one for each element
3     quantized    step, float64, little-endian; three int8 centroid offsets (``quantize.Quantized``); then the levels
                   (``entropy``)
====  ===========  ===================================================================================================

The vector named ``delta`` is quantized, all others travel raw, and so does ``delta`` where that is not larger.
"""

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edge_client.codec.entropy import decode_levels, encode_levels
from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import Quantized, peak, quantize
from edge_client.errors import CodecError

MAGIC = b"FU"
VERSION = 1
HEADER_LIMIT = 16384
DELTA = "delta"
"""The vector that is quantized and has a residual."""

ZERO, NONFINITE, RAW, QUANTIZED = range(4)

_TABLE = struct.Struct("<d3b")
_DIGEST = 8
_Name = Annotated[str, Meta(min_length=1, max_length=64)]


class CodecSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How updates are encoded.

    ``kind``: quantized, or none for float32 as it is. ``step``: distance of two levels, in root mean squares of the
    vector. ``dead_zone``: in steps, what is smaller is sent as zero and stays in the residual.
    """

    kind: Literal["quantized", "none"] = "quantized"
    step: Annotated[float, Meta(gt=0, le=1000)] = 2.0
    dead_zone: Annotated[float, Meta(ge=0.5, le=1)] = 0.7


@dataclass(frozen=True)
class EncodedUpdate:
    """Bytes to send; what they leave out of ``delta`` (``[n] float32``); and the step used (0.0 where none was), for
    ``pack_residual``."""

    data: bytes
    residual: Vector
    step: float


@dataclass(frozen=True)
class DecodedUpdate:
    """An update as received: each vector in full (``[layout.size] float32``), each scalar."""

    vectors: dict[str, Vector]
    scalars: dict[str, float]


class _Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    kind: Annotated[int, Meta(ge=ZERO, le=QUANTIZED)]
    length: Annotated[int, Meta(ge=0, lt=2**34)]


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    layouts: Annotated[bytes, Meta(min_length=_DIGEST, max_length=_DIGEST)]
    scalars: Annotated[dict[_Name, float], Meta(max_length=256)]
    vectors: Annotated[dict[_Name, _Part], Meta(max_length=64)]


_HEADER = msgspec.msgpack.Decoder(_Header)


def encode_update(
    vectors: Mapping[str, Vector],
    layouts: Mapping[str, Layout],
    scalars: Mapping[str, float],
    settings: CodecSettings,
) -> EncodedUpdate:
    """Encode what a client learned.

    Args:
        vectors: float32 vectors by name, each as long as its layout. ``delta`` is what to quantize: the new parameters
            less the received ones, plus the residual of before.
        layouts: the layout of each, by the same names.
        scalars: at most 256, such as samples, steps and metrics; any float.
        settings: rate and kind.

    Returns:
        The bytes, at most ``max_update_bytes(layouts)``, and the new residual: zeros where everything was sent, where
        ``delta`` is not finite, and of length 0 where there is no ``delta``.

    Raises:
        CodecError: vectors and layouts do not fit each other, or there are too many names for the header.
    """
    if set(vectors) != set(layouts):
        raise CodecError(f"update has the vectors {sorted(vectors)}; expected {sorted(layouts)}, one for each layout")
    parts: dict[str, _Part] = {}
    payload: list[bytes] = []
    residual, step = np.zeros(0, np.float32), 0.0
    for name in sorted(vectors):
        vector = vectors[name]
        layouts[name].check(vector)
        quantized = None
        highest = peak(vector)
        if not math.isfinite(highest):
            kind, data = NONFINITE, b""
        elif highest == 0:
            kind, data = ZERO, b""
        else:
            kind, data = RAW, b""
            if name == DELTA and settings.kind == "quantized":
                quantized = quantize(vector, settings.step, settings.dead_zone)
                kind, data = QUANTIZED, _encode_quantized(quantized, layouts[name])
            if kind == RAW or len(data) >= 4 * vector.size:
                kind, data, quantized = RAW, vector.astype("<f4", copy=False).tobytes(), None
        if name == DELTA and quantized is None:
            residual = np.zeros_like(vector)
        elif quantized is not None:
            residual, step = vector.copy(), quantized.step
            residual[quantized.index] -= quantized.values()
        parts[name] = _Part(kind, len(data))
        payload.append(data)
    header = msgspec.msgpack.encode(
        _Header(_layouts_digest(layouts), {name: _compact(value) for name, value in scalars.items()}, parts)
    )
    data = b"".join([MAGIC, bytes([VERSION]), varint(len(header)), header, *payload])
    if len(header) > HEADER_LIMIT:
        raise CodecError(
            f"update has a header of {len(header)} bytes; expected at most {HEADER_LIMIT}: send fewer scalars"
        )
    _read_header(Reader(data, "update"))  # whatever a decoder would refuse is refused here, where it can be helped
    return EncodedUpdate(data, residual, step)


def decode_update(data: bytes, layouts: Mapping[str, Layout]) -> DecodedUpdate:
    """Decode what ``encode_update`` wrote, for the same layouts.

    Vectors that were not finite come back as NaN throughout. Memory stays in proportion to the layouts, whatever the
    bytes claim.

    Raises:
        CodecError: the bytes are damaged, of another version, or for other layouts.
    """
    reader = Reader(data, "update")
    header = _read_header(reader)
    if set(header.vectors) != set(layouts):
        raise CodecError(f"update has the vectors {sorted(header.vectors)}; expected {sorted(layouts)}: other bundle?")
    if header.layouts != (expected := _layouts_digest(layouts)):
        raise CodecError(
            f"update is for layouts {header.layouts.hex()}; expected {expected.hex()}: it belongs to another bundle"
        )
    vectors = {
        name: _decode_vector(reader.take(part.length), part.kind, layouts[name], name)
        for name, part in header.vectors.items()
    }
    reader.end()
    return DecodedUpdate(vectors, header.scalars)


def decode_scalars(data: bytes) -> dict[str, float]:
    """Only the scalars, without a look at the vectors.

    Raises:
        CodecError: the header is damaged or of another version.
    """
    return _read_header(Reader(data, "update")).scalars


def max_update_bytes(layouts: Mapping[str, Layout]) -> int:
    """No update for these layouts is longer: refuse what is, before receiving it."""
    return len(MAGIC) + 1 + 3 + HEADER_LIMIT + sum(4 * layout.size for layout in layouts.values())


def _layouts_digest(layouts: Mapping[str, Layout]) -> bytes:
    sha = hashlib.sha256()
    for name in sorted(layouts):
        sha.update(name.encode() + b"\0" + layouts[name].digest)
    return sha.digest()[:_DIGEST]


def _compact(value: float) -> float:
    """Whole numbers as integers: one to five bytes instead of nine."""
    value = float(value)
    if value.is_integer() and abs(value) < 2**53 and math.copysign(1, value) * value > 0:
        return int(value)
    return value


def _read_header(reader: Reader) -> _Header:
    magic, version = bytes(reader.take(len(MAGIC))), reader.take(1)[0]
    if magic != MAGIC:
        raise CodecError(f"not an update: it starts with {magic!r}; expected {MAGIC!r}")
    if version != VERSION:
        raise CodecError(f"update has format version {version}; expected {VERSION}: update the older side")
    try:
        return _HEADER.decode(reader.take(reader.varint(HEADER_LIMIT)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CodecError(f"update has a corrupt header: {error}; fetch it again") from error


def _encode_quantized(quantized: Quantized, layout: Layout) -> bytes:
    return _TABLE.pack(quantized.step, *quantized.offsets) + encode_levels(quantized.index, quantized.level, layout)


def _decode_vector(data: memoryview, kind: int, layout: Layout, name: str) -> Vector:
    what = f"vector {name!r} of the update"
    if kind == RAW:
        if len(data) != 4 * layout.size:
            raise CodecError(f"{what} has {len(data)} bytes; expected {4 * layout.size}: fetch it again")
        return np.frombuffer(data, "<f4").astype(np.float32)
    if kind == QUANTIZED:
        reader = Reader(data, what)
        step, *offsets = _TABLE.unpack(reader.take(_TABLE.size))
        if not 0 < step < math.inf:
            raise CodecError(f"{what} has step {step}; expected a positive finite number: fetch it again")
        index, level = decode_levels(data[_TABLE.size :], layout, what)
        return Quantized(step, (offsets[0], offsets[1], offsets[2]), index, level).scatter(layout.size)
    Reader(data, what).end()
    return np.full(layout.size, math.nan if kind == NONFINITE else 0.0, np.float32)
