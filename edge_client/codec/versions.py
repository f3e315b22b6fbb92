"""The global model's parameters as a sum of codes: versions, deltas between any two of them, and their packed form.

A version is the bundle's weights and a few quantized vectors (`vector`) added to them, one after another, in float32:
decoding is exact, so equal codes give equal bits on every machine. Versions share their first codes, and a delta is
those that the holder of another version lacks. What the model learned is nearly low-rank, as updates are, and is told
in as few bytes. With codec ``none`` a version is its float32 values, and a delta is all of them.

The bytes of states and deltas, and what their digests are over, are in ``FORMAT.md``.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import numpy as np

from edge_client.codec.integers import Reader, section, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.quantize import peak
from edge_client.codec.vector import decode_vector
from edge_client.errors import CodecError

VERSION = 3
CODES_LIMIT = 32
"""Most codes of one version: bounds what hostile bytes make the decoder do."""
_DELTA, _STATE = b"FD", b"FS"
_CODED, _RAW = 0, 1
_KEPT, _DIGEST, _NAMED = 8, 16, 32


@dataclass(frozen=True, eq=False)
class CodedState:
    """One version of the global model: ``codes`` lead to it from the bundle's weights.

    A code is the bytes of a quantized vector of ``layout.size`` parameters, or empty, which is a vector of zeros.
    ``named`` is the digest that the version must have, where somebody said so: the codes are decoded when they are
    first needed, and CodecError is raised then where they lead elsewhere.

    Raises:
        CodecError: there are more than ``CODES_LIMIT`` codes.
    """

    layout: Layout
    codes: tuple[bytes, ...] = ()
    named: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.codes) > CODES_LIMIT:
            raise CodecError(f"version has {len(self.codes)} codes; expected at most {CODES_LIMIT}")

    @cached_property
    def offset(self) -> Vector:
        """``[n] float32``, read-only: the sum of what the codes hold, the parameters less the bundle's weights."""
        offset = add_codes(self.codes, self.layout)
        if self.named is not None and self._over(offset) != self.named:
            raise CodecError(
                f"version is corrupt: its codes lead to {self._over(offset).hex()[:16]}, not to "
                f"{self.named.hex()[:16]}; fetch it again"
            )
        offset.setflags(write=False)
        return offset

    def parameters(self, base: Vector) -> Vector:
        """The published parameters, ``base`` and the offset, in float32 (``[n]``, new)."""
        if base.shape != (self.layout.size,) or base.dtype != np.float32:
            raise CodecError(f"base is {base.dtype} {list(base.shape)}; expected float32 [{self.layout.size}]")
        return base + self.offset

    def digest(self) -> bytes:
        """32 bytes that name this version."""
        return self._digest

    def at_rest(self) -> "CodedState":
        """The same version without its offset in memory."""
        return CodedState(self.layout, self.codes, self.digest())

    @cached_property
    def _digest(self) -> bytes:
        return self._over(self.offset) if self.named is None else self.named

    def _over(self, offset: Vector) -> bytes:
        blake = hashlib.blake2b(b"C" + _listed(self.codes), digest_size=_NAMED)
        blake.update(np.ascontiguousarray(offset, "<f4").data)
        return blake.digest()


@dataclass(frozen=True, eq=False)
class RawState:
    """One version of the global model in full: ``values`` ``[n] float32``, seen read-only."""

    values: Vector

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.ndim != 1:
            raise CodecError(f"raw state is {self.values.dtype} {list(self.values.shape)}; expected float32 [n]")
        view = self.values.view()
        view.setflags(write=False)
        object.__setattr__(self, "values", view)

    def parameters(self, base: Vector) -> Vector:
        """The published parameters (``[n] float32``, a copy); ``base`` must only have their shape."""
        if base.shape != self.values.shape:
            raise CodecError(f"base has shape {list(base.shape)}; expected {list(self.values.shape)}")
        return self.values.copy()

    def digest(self) -> bytes:
        """32 bytes that name this version."""
        return self._digest

    def at_rest(self) -> "RawState":
        """The same."""
        return self

    @cached_property
    def _digest(self) -> bytes:
        blake = hashlib.blake2b(b"R", digest_size=_NAMED)
        blake.update(np.ascontiguousarray(self.values, "<f4").data)
        return blake.digest()


State = CodedState | RawState


def add_codes(codes: Sequence[bytes], layout: Layout) -> Vector:
    """What the codes hold, added up in their order from zeros: ``[layout.size] float32``, new.

    Raises:
        CodecError: a code is not a quantized vector of this layout, or the sum is not finite.
    """
    total = np.zeros(layout.size, np.float32)
    for code in codes:
        if code:
            with np.errstate(over="ignore", invalid="ignore"):
                total += decode_vector(memoryview(code), layout, "version")
    if not math.isfinite(peak(total)):
        raise CodecError("version is corrupt: its codes add up to what is not finite; fetch it again")
    return total


def shared(old: CodedState, new: CodedState) -> int:
    """How many of their first codes two versions have in common."""
    pairs = zip(old.codes, new.codes, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def encode_delta(old: State, new: State) -> bytes:
    """Bytes that lead a holder of ``old`` to ``new``: the codes that it lacks.

    Raises:
        CodecError: the states are of different models or codecs.
    """
    if isinstance(new, RawState):
        return _head(_DELTA, _RAW) + new.digest()[:_DIGEST] + new.values.astype("<f4", copy=False).tobytes()
    if isinstance(old, RawState):
        raise CodecError("a raw version has no delta to a coded version; expected two versions of one codec")
    if old.layout != new.layout:
        raise CodecError(f"versions have {old.layout.size} and {new.layout.size} parameters; expected one layout")
    kept = shared(old, new)
    start = varint(kept) + _summary(old.codes[:kept])
    return _head(_DELTA, _CODED) + new.digest()[:_DIGEST] + start + _listed(new.codes[kept:])


def apply_delta(old: State, data: bytes, layout: Layout) -> State:
    """The state that ``data``, a delta for ``old``, leads to; ``old`` stays as it is.

    Raises:
        CodecError: the bytes are damaged, or lead from another state than ``old``.
    """
    reader = Reader(data, "delta")
    kind, digest = _read_kind(reader, _DELTA), bytes(reader.take(_DIGEST))
    if kind == _RAW:
        return _verified(_read_raw(reader, layout), digest, "delta")
    if isinstance(old, RawState):
        raise CodecError("delta is for a coded version; expected one for a raw version, which is held")
    kept, summary = reader.varint(CODES_LIMIT), bytes(reader.take(_KEPT))
    if kept > len(old.codes) or summary != _summary(old.codes[:kept]):
        raise CodecError(
            f"delta continues {kept} codes {summary.hex()}; expected {_summary(old.codes[:kept]).hex()}, of the "
            f"{len(old.codes)} that are here: ask for the delta from the version that is held"
        )
    state = CodedState(layout, (*old.codes[:kept], *_read_codes(reader)))
    return _verified(state, digest, "delta")


def pack_state(state: State) -> bytes:
    """A state on its own, compact, for the server's ledger and the device's store."""
    if isinstance(state, RawState):
        return _head(_STATE, _RAW) + state.digest() + state.values.astype("<f4", copy=False).tobytes()
    return _head(_STATE, _CODED) + state.digest() + _listed(state.codes)


def unpack_state(data: bytes, layout: Layout) -> State:
    """Read what ``pack_state`` wrote, for a model of ``layout.size`` parameters; codes are decoded when needed.

    Raises:
        CodecError: the bytes are damaged or hold a state of another size.
    """
    reader = Reader(data, "state")
    kind, digest = _read_kind(reader, _STATE), bytes(reader.take(_NAMED))
    if kind == _RAW:
        return _verified(_read_raw(reader, layout), digest, "state")
    return CodedState(layout, _read_codes(reader), digest)


def _head(magic: bytes, kind: int) -> bytes:
    return magic + bytes([VERSION, kind])


def _listed(codes: Sequence[bytes]) -> bytes:
    return varint(len(codes)) + b"".join(section(code) for code in codes)


def _summary(codes: Sequence[bytes]) -> bytes:
    return hashlib.blake2b(_listed(codes), digest_size=_KEPT).digest()


def _read_codes(reader: Reader) -> tuple[bytes, ...]:
    codes = tuple(bytes(reader.section()) for _ in range(reader.varint(CODES_LIMIT)))
    reader.end()
    return codes


def _read_kind(reader: Reader, magic: bytes) -> int:
    found, version, kind = bytes(reader.take(2)), reader.take(1)[0], reader.take(1)[0]
    if found != magic:
        raise CodecError(f"not a {reader.what}: it starts with {found!r}; expected {magic!r}")
    if version != VERSION or kind > _RAW:
        raise CodecError(
            f"{reader.what} has format version {version}, kind {kind}; expected version {VERSION}: "
            "update the older side"
        )
    return kind


def _read_raw(reader: Reader, layout: Layout) -> RawState:
    values = np.frombuffer(reader.take(4 * layout.size), "<f4").astype(np.float32)
    reader.end()
    return RawState(values)


def _verified(state: State, digest: bytes, what: str) -> State:
    found = state.digest()
    if found[: len(digest)] != digest:
        raise CodecError(
            f"{what} is corrupt: it leads to {found.hex()[:16]}, not to {digest.hex()[:16]}; fetch it again"
        )
    return state
