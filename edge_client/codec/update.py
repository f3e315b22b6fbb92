"""What a client sends after training: named vectors and named scalars in one run of bytes.

The vector named ``delta`` is quantized, all others travel raw, and so does ``delta`` where that is not larger. The
bytes are an *update* in ``FORMAT.md``.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from edge_client.codec.blocks import blocks
from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import peak
from edge_client.codec.rate import solve
from edge_client.codec.vector import VectorEncoder, decode_block, decode_vector
from edge_client.errors import CodecError

MAGIC = b"FU"
VERSION = 2
HEADER_LIMIT = 16384
DELTA = "delta"
"""The vector that is quantized and has a residual."""

ZERO, NONFINITE, RAW, QUANTIZED = range(4)

_BYTES_SLOPE, _NOISE_SLOPE = -1.5, 1.2
_STEP_AT_A_BIT, _STEP_AT_ALL_NOISE = 0.95, 8.0
"""Of real updates, in root mean squares: where rate control begins."""
_LENGTH = 2
"""About what a vector's length takes beyond that of no bytes."""

TARGETS = {"step": 1000.0, "absolute": 1e12, "bits": 32.0, "bytes": 2.0**34, "nmse": 0.999}
"""Largest value of each target."""

_DIGEST = 8
_Name = Annotated[str, Meta(min_length=1, max_length=64)]


class CodecSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How updates are encoded.

    ``kind``: quantized, or none for float32 as it is. ``target`` and ``value`` say how finely:

    ========  ===========================================================================================
    step      distance of two levels, in root mean squares of the vector, up to 1000
    absolute  distance of two levels, in units of parameters, up to 1e12; a vector far below it is all zero
    bits      bits of the vector and the header for each parameter, up to 32; vectors that travel raw apart
    bytes     bytes of the whole update
    nmse      energy of what is lost as a share of the vector's (normalized mean squared error), below 1
    ========  ===========================================================================================

    Raises:
        ValueError: the value is out of the target's range.
    """

    kind: Literal["quantized", "none"] = "quantized"
    target: Literal["step", "absolute", "bits", "bytes", "nmse"] = "nmse"
    value: Annotated[float, Meta(gt=0)] = 0.1

    def __post_init__(self) -> None:
        limit = TARGETS[self.target]
        if not self.value <= limit:
            raise ValueError(f"value is {self.value:g} {self.target}; expected at most {limit:g}")


@dataclass(frozen=True)
class EncodedUpdate:
    """Bytes to send, and what they leave out of ``delta`` (``[n] float32``)."""

    data: bytes
    residual: Vector


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
    payload: dict[str, tuple[int, bytes]] = {}
    residual = np.zeros(0, np.float32)
    # The quantized vector comes last: what the others take is not there for it where bytes are the target.
    for name in sorted(vectors, key=lambda name: (name == DELTA, name)):
        vector = vectors[name]
        layouts[name].check(vector)
        highest = peak(vector)
        if not math.isfinite(highest):
            payload[name] = NONFINITE, b""
        elif highest == 0:
            payload[name] = ZERO, b""
        else:
            if name == DELTA and settings.kind == "quantized":
                spent = len(_frame(layouts, scalars, {**payload, name: (QUANTIZED, b"")})) + _LENGTH
                if settings.target == "bits":
                    spent -= sum(len(other) for _, other in payload.values())
                encoder = _quantized(vector, layouts[name], settings, spent)
                if len(encoder.data) < 4 * vector.size:
                    payload[name] = QUANTIZED, encoder.data
                    residual = encoder.residual
                    continue
            payload[name] = RAW, vector.astype("<f4", copy=False).tobytes()
        if name == DELTA:
            residual = np.zeros_like(vector)
    data = _frame(layouts, scalars, payload)
    _read_header(Reader(data, "update"))  # whatever a decoder would refuse is refused here, where it can be helped
    return EncodedUpdate(data, residual)


def _frame(
    layouts: Mapping[str, Layout], scalars: Mapping[str, float], payload: Mapping[str, tuple[int, bytes]]
) -> bytes:
    parts = {name: _Part(payload[name][0], len(payload[name][1])) for name in sorted(payload)}
    header = msgspec.msgpack.encode(
        _Header(_layouts_digest(layouts), {name: _compact(value) for name, value in scalars.items()}, parts)
    )
    if len(header) > HEADER_LIMIT:
        raise CodecError(
            f"update has a header of {len(header)} bytes; expected at most {HEADER_LIMIT}: send fewer scalars"
        )
    return b"".join([MAGIC, bytes([VERSION]), varint(len(header)), header, *(payload[name][1] for name in parts)])


def _quantized(vector: Vector, layout: Layout, settings: CodecSettings, spent: int) -> VectorEncoder:
    """The vector, encoded as the settings say, where ``spent`` bytes of the update are taken."""
    encoder = VectorEncoder(vector, layout)
    if settings.target == "absolute":
        encoder.encode(settings.value, silent=True)
        return encoder
    if settings.target == "step":
        encoder.encode(settings.value * encoder.rms)
        return encoder
    if settings.target == "nmse":
        start = _STEP_AT_ALL_NOISE * math.sqrt(settings.value) * encoder.rms
        solve(encoder.noise, settings.value, start, _NOISE_SLOPE, encoder.bounds)
        encoder.encode(encoder.step)
        return encoder
    whole = settings.value * vector.size / 8 if settings.target == "bits" else settings.value
    goal = max(whole - spent, 1.0)
    start = _STEP_AT_A_BIT * (vector.size / 8 / goal) ** (-1 / _BYTES_SLOPE) * encoder.rms
    solve(lambda step: float(len(encoder.encode(step))), goal, start, _BYTES_SLOPE, encoder.bounds)
    return encoder


class UpdateReader:
    """An update of which only what is asked for is decoded.

    Args:
        data: what ``encode_update`` wrote.
        layouts: those that it was written for.

    Raises:
        CodecError: the header is damaged, of another version, or for other layouts.
    """

    def __init__(self, data: bytes | memoryview, layouts: Mapping[str, Layout]) -> None:
        reader = Reader(data, "update")
        header = _read_header(reader)
        if set(header.vectors) != set(layouts):
            raise CodecError(
                f"update has the vectors {sorted(header.vectors)}; expected {sorted(layouts)}: other bundle?"
            )
        if header.layouts != (expected := _layouts_digest(layouts)):
            raise CodecError(
                f"update is for layouts {header.layouts.hex()}; expected {expected.hex()}: it belongs to another bundle"
            )
        self._layouts = layouts
        self._parts = {name: (part.kind, reader.take(part.length)) for name, part in header.vectors.items()}
        reader.end()
        self.scalars = header.scalars

    def vector(self, name: str) -> Vector:
        """A whole vector: ``[layout.size] float32``, NaN throughout where it was not finite.

        Memory stays in proportion to the layout, whatever the bytes claim.

        Raises:
            CodecError: the vector's bytes are damaged.
        """
        kind, data = self._parts[name]
        layout, what = self._layouts[name], _what(name)
        if kind == QUANTIZED:
            return decode_vector(data, layout, what)
        return _plain(kind, data, layout.size, slice(0, layout.size), what)

    def block(self, name: str, number: int) -> Vector:
        """One of the `blocks.blocks` of a vector's layout, the others' bytes unread; otherwise as `vector`."""
        kind, data = self._parts[name]
        layout, what = self._layouts[name], _what(name)
        if kind == QUANTIZED:
            return decode_block(data, layout, number, what)
        return _plain(kind, data, layout.size, blocks(layout)[number].where, what)


def decode_update(data: bytes, layouts: Mapping[str, Layout]) -> DecodedUpdate:
    """Decode what ``encode_update`` wrote, for the same layouts, in full (see `UpdateReader`).

    Raises:
        CodecError: the bytes are damaged, of another version, or for other layouts.
    """
    reader = UpdateReader(data, layouts)
    return DecodedUpdate({name: reader.vector(name) for name in sorted(layouts)}, reader.scalars)


def decode_scalars(data: bytes) -> dict[str, float]:
    """Only the scalars, without a look at the vectors.

    Raises:
        CodecError: the header is damaged or of another version.
    """
    return _read_header(Reader(data, "update")).scalars


def vector_names(data: bytes) -> frozenset[str]:
    """The names of the vectors that an update says it has, without a look at them.

    Raises:
        CodecError: the header is damaged or of another version.
    """
    return frozenset(_read_header(Reader(data, "update")).vectors)


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


def _what(name: str) -> str:
    return f"vector {name!r} of the update"


def _plain(kind: int, data: memoryview, size: int, where: slice, what: str) -> Vector:
    """The elements at ``where`` of a vector of ``size`` that is not quantized."""
    if kind == RAW:
        if len(data) != 4 * size:
            raise CodecError(f"{what} has {len(data)} bytes; expected {4 * size}: fetch it again")
        return np.frombuffer(data[4 * where.start : 4 * where.stop], "<f4").astype(np.float32)
    Reader(data, what).end()
    return np.full(where.stop - where.start, math.nan if kind == NONFINITE else 0.0, np.float32)
