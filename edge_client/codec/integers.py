"""Lists of small non-negative integers in few bytes, and a bounds-checked cursor over received bytes.

The primitive that the rest of the codec is written in. Coders stand behind one tag: pcodec for long lists (within half
a percent of the entropy), Golomb-Rice codes for short ones, where pcodec's forty bytes of header would be the larger
part; short lists of mostly zeros skip these. The bytes are *lists*, *varints* and *sections* in ``FORMAT.md``.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from edge_client.errors import CodecError

Integers = npt.NDArray[np.uint32]

PIECE = 1 << 16
"""Values of a long array that are looked at at once: what that takes stays small, and in the cache."""
CONSTANT = 32
PCODEC = 33
SPARSE = 34
RICE_COUNT = 4096
"""Longest list in a Golomb-Rice code: from there on pcodec is smaller, and its decoder needs no scratch space."""
_PCODEC_LEAST = 32
"""Bytes that pcodec needs for any list, about."""
RICE_BITS_EACH = 64
"""Most bits an integer may take on average in a Golomb-Rice list; bounds what a hostile list makes the decoder
unpack."""


class Reader:
    """A cursor over received bytes that raises CodecError where they end too early.

    Args:
        data: the bytes to read.
        what: names them in error messages, such as "update".
    """

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self.what = what

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes."""
        if count > len(self._data) - self._at:
            raise CodecError(
                f"{self.what} is cut off: {len(self._data) - self._at} bytes left where {count} are expected; "
                "fetch it again"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self, limit: int) -> int:
        """The next varint; CodecError if it is above ``limit``."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value > limit:
                    break
                return value
        raise CodecError(f"{self.what} is corrupt: found a count above {limit}, the most that fits; fetch it again")

    def section(self) -> memoryview:
        """The next run of bytes that its length, a varint, precedes."""
        return self.take(self.varint(len(self._data) - self._at))

    def rest(self) -> memoryview:
        """Everything that is left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Raise CodecError unless everything was read."""
        if self._at != len(self._data):
            raise CodecError(f"{self.what} is corrupt: {len(self._data) - self._at} bytes too many; fetch it again")


def varint(value: int) -> bytes:
    """``value`` (0 .. 2^35 - 1) as a varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def section(data: bytes) -> bytes:
    """``data`` with its length before it, as ``Reader.section`` reads it."""
    return varint(len(data)) + data


def pieces(low: int, high: int, least: int = 0) -> Iterator[slice]:
    """The range from ``low`` to ``high`` cut into runs of ``PIECE``, or of ``least`` where that is more."""
    each = max(PIECE, least)
    return (slice(at, min(at + each, high)) for at in range(low, high, each))


def pack(values: Integers) -> bytes:
    """The shortest of the lists above for ``values`` (``[count] uint32``)."""
    count = len(values)
    if count == 0:
        return b""
    if values[0] == values.max() and values[0] == values.min():
        return bytes([CONSTANT]) + varint(int(values[0]))
    best = b""
    if count <= RICE_COUNT:
        k, bits = _rice_parameter(values)
        if bits <= RICE_BITS_EACH * count:
            best = bytes([k]) + _rice(values, k, bits)
        hits = np.flatnonzero(values)
        if 2 * len(hits) <= count:
            gaps = np.diff(hits, prepend=-1) - 1
            sparse = bytes([SPARSE]) + varint(len(hits)) + section(pack(gaps.astype(np.uint32)))
            sparse += pack(values[hits] - np.uint32(1))
            best = min(best or sparse, sparse, key=len)
    if best and len(best) <= _PCODEC_LEAST:
        return best
    # Levels 0 and up trade speed for size; 8 is within half a percent of the entropy. Automatic modes cost time and
    # cannot help: neighbours are independent once the classes are known.
    config = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    long = bytes([PCODEC]) + bytes(standalone.simple_compress(np.ascontiguousarray(values), config))
    return long if not best or len(long) < len(best) else best


def unpack(data: memoryview, count: int, what: str) -> Integers:
    """Read a list of ``count`` integers; allocates ``4 * count`` bytes, so ``count`` must be bounded by the caller.

    Raises:
        CodecError: the bytes are not such a list.
    """
    if count == 0:
        Reader(data, what).end()
        return np.empty(0, np.uint32)
    reader = Reader(data, what)
    tag = reader.take(1)[0]
    if tag < CONSTANT and count <= RICE_COUNT:
        return _unrice(data[1:], tag, count, what)
    if tag == CONSTANT:
        value = reader.varint(2**32 - 1)
        reader.end()
        return np.full(count, value, np.uint32)
    if tag == PCODEC:
        return _unpcodec(bytes(data[1:]), count, what)
    if tag == SPARSE and count <= RICE_COUNT:
        return _unsparse(reader, count, what)
    raise CodecError(f"{what} is corrupt: list of {count} integers has coder {tag}; fetch it again")


def _rice_parameter(values: Integers) -> tuple[int, int]:
    """The parameter that makes the shortest code, and that code's bits."""
    wide = values.astype(np.uint64)
    # The best parameter is within one of the mean's logarithm for a geometric source; other sources get the same
    # window.
    middle = max(int(wide.mean()).bit_length() - 1, 0)
    return min(
        (
            (k, int((wide >> np.uint64(k)).sum()) + (k + 1) * len(values))
            for k in range(max(middle - 2, 0), middle + 2)
            if k < 32
        ),
        key=lambda found: found[1],
    )


def _rice(values: Integers, k: int, bits: int) -> bytes:
    out = np.zeros(bits, np.uint8)
    ends = np.cumsum((values >> np.uint32(k)).astype(np.int64) + 1) - 1
    out[ends] = 1
    shifts = np.arange(k - 1, -1, -1, dtype=np.uint32)
    out[int(ends[-1]) + 1 :] = ((values[:, None] >> shifts) & np.uint32(1)).ravel()
    return np.packbits(out).tobytes()


def _unrice(data: memoryview, k: int, count: int, what: str) -> Integers:
    if len(data) > RICE_BITS_EACH * count // 8 + 1:
        raise CodecError(f"{what} is corrupt: {len(data)} bytes for a list of {count} integers; fetch it again")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    ends = np.flatnonzero(bits)[:count]
    used = int(ends[-1]) + 1 + k * count if len(ends) == count else -1
    if used < 0 or (used + 7) // 8 != len(data):
        raise CodecError(
            f"{what} is corrupt: a list of {count} integers does not fill its {len(data)} bytes; fetch it again"
        )
    quotients = np.diff(ends, prepend=-1) - 1
    weights = np.int64(1) << np.arange(k - 1, -1, -1, dtype=np.int64)
    remainders = bits[int(ends[-1]) + 1 : used].reshape(count, k).astype(np.int64) @ weights
    values = (quotients << k) | remainders
    if values.max() >= 2**32:
        raise CodecError(f"{what} is corrupt: an integer does not fit 32 bits; fetch it again")
    return values.astype(np.uint32)


def _unsparse(reader: Reader, count: int, what: str) -> Integers:
    # Halving the count bounds how deep lists lie in lists.
    hits = reader.varint(count // 2)
    gaps = unpack(reader.section(), hits, what)
    values = np.zeros(count, np.uint32)
    places = np.cumsum(gaps + np.int64(1)) - 1
    found = unpack(reader.rest(), hits, what)
    if hits and (int(places[-1]) >= count or int(found.max()) == 2**32 - 1):
        raise CodecError(
            f"{what} is corrupt: a list of {count} integers holds one that is out of range; fetch it again"
        )
    values[places] = found + np.uint32(1)
    return values


def _unpcodec(data: bytes, count: int, what: str) -> Integers:
    values = np.zeros(count, np.uint32)
    try:
        progress = standalone.simple_decompress_into(data, values)
    except BaseException as error:
        # A panic inside pcodec arrives as pyo3's PanicException, which derives from BaseException; nothing else of
        # that kind may stop here.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CodecError(
            f"{what} is corrupt: pcodec refuses a list of {count} integers ({error}); fetch it again"
        ) from error
    if progress.n_processed != count or not progress.finished:
        raise CodecError(f"{what} is corrupt: a list does not hold the {count} integers it should; fetch it again")
    return values
