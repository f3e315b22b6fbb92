"""The global model as integers: versions, exact deltas between any two of them, and their packed form.

Published parameters are ``base + 2^exponent * k`` with integer ``k``, ``|k| < 2^24``. ``2^exponent * k`` is exact in
float32, so the sum is rounded once, the same way on every machine: equal ``k`` give equal bits. The exponent only
falls (``k`` doubles), so the difference of any two versions is an integer vector at the finer exponent, and deltas add
up without loss. With codec ``none`` a version is its float32 values, and a delta is all of them.

The bytes of states and deltas, and what their digests are over, are in ``FORMAT.md``.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from edge_client.codec.blocks import blocks, join, split
from edge_client.codec.entropy import decode_levels, encode_levels
from edge_client.codec.integers import Reader
from edge_client.codec.layout import Layout, TensorSpec, Vector
from edge_client.errors import CodecError

K_LIMIT = 2**24
"""``|k|`` is below this, so that float32 holds each ``k`` exactly."""
EXPONENT_LIMIT = 100
"""Exponents lie in -100 .. 100, so that ``2^exponent * k`` is a normal float32 or zero."""

VERSION = 2
_DELTA, _STATE = b"FD", b"FS"
_LATTICE, _RAW = 0, 1
_OLD, _NEW = 8, 16
_SHIFT_LIMIT = 2**30


@dataclass(frozen=True, eq=False)
class LatticeState:
    """One version of the global model.

    ``exponent``: log2 of the step, -100 .. 100; ``k``: ``[n]`` int8, int16 or int32, each below 2^24 in magnitude. The
    state sees ``k`` read-only, in the smallest of these that holds it; who made it must not change it either. Two
    states are the same version when their digests are.

    Raises:
        CodecError: the exponent or a ``k`` is out of range.
    """

    exponent: int
    k: npt.NDArray[np.signedinteger]

    def __post_init__(self) -> None:
        if not -EXPONENT_LIMIT <= self.exponent <= EXPONENT_LIMIT:
            raise CodecError(f"lattice exponent is {self.exponent}; expected -{EXPONENT_LIMIT} to {EXPONENT_LIMIT}")
        if self.k.dtype not in (np.int8, np.int16, np.int32) or self.k.ndim != 1:
            raise CodecError(f"lattice coordinates are {self.k.dtype} {list(self.k.shape)}; expected int32 [n]")
        if self.highest >= K_LIMIT:
            raise CodecError(
                f"lattice coordinate {self.highest} is out of range; expected below {K_LIMIT}: use a coarser step"
            )
        view = self.k.astype(f"i{self._width}", copy=False).view()
        view.setflags(write=False)
        object.__setattr__(self, "k", view)

    @cached_property
    def highest(self) -> int:
        """Largest magnitude of a coordinate."""
        return max(int(self.k.max()), -int(self.k.min())) if self.k.size else 0

    @property
    def _width(self) -> int:
        """Bytes that hold a coordinate."""
        return 1 if self.highest < 2**7 else 2 if self.highest < 2**15 else 4

    @property
    def step(self) -> float:
        """Distance of two lattice points."""
        return math.ldexp(1.0, self.exponent)

    def parameters(self, base: Vector) -> Vector:
        """The published parameters, ``base + step * k``, in float32 (``[n]``, new), the same bits on every platform."""
        if base.shape != self.k.shape or base.dtype != np.float32:
            raise CodecError(f"base is {base.dtype} {list(base.shape)}; expected float32 {list(self.k.shape)}")
        vector = self.k.astype(np.float32)
        vector *= np.float32(self.step)
        vector += base
        return vector

    def digest(self) -> bytes:
        """32 bytes that name this version."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        # Hashing is what verifying a version costs most, so it reads as few bytes as hold the coordinates.
        exponent = self.exponent if self.highest else 0
        head = b"L" + exponent.to_bytes(4, "little", signed=True) + bytes([self._width])
        blake = hashlib.blake2b(head, digest_size=32)
        blake.update(np.ascontiguousarray(self.k, f"<i{self._width}").data)
        return blake.digest()


@dataclass(frozen=True, eq=False)
class RawState:
    """One version of the global model without a lattice: ``values`` ``[n] float32``, seen read-only."""

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

    @cached_property
    def _digest(self) -> bytes:
        blake = hashlib.blake2b(b"R", digest_size=32)
        blake.update(np.ascontiguousarray(self.values, "<f4").data)
        return blake.digest()


State = LatticeState | RawState


def origin(n: int, exponent: int = 0) -> LatticeState:
    """Version 0 of a model with ``n`` parameters: the base itself."""
    return LatticeState(exponent, np.zeros(n, np.int8))


def place(
    target: npt.NDArray[np.floating],
    base: Vector,
    exponent: int,
    held: LatticeState | None = None,
    reach: float = 0.5,
) -> tuple[LatticeState, Vector]:
    """The lattice point nearest to ``target``, or the held one where that is near enough.

    A parameter on a noisy walk crosses the border between two points again and again, and each crossing is sent to
    every client. With hysteresis it has to go further than half a step before it moves, and then moves to the nearest
    point, away from all borders.

    Args:
        target: ``[n]`` float32 or float64, the parameters that the server would like to publish.
        base: ``[n] float32``.
        exponent: of the new state, not above that of ``held``.
        held: the version before; without it, all go to their nearest points.
        reach: a parameter at most this many steps from where it is held stays there; from 0.5, which is no hysteresis.

    Returns:
        The state, and what it leaves out: ``target - state.parameters(base)``, ``[n] float32``, for the server to add
        to its next target.

    Raises:
        CodecError: the target is not finite, of another shape, or too far from the base for this exponent.
    """
    if target.shape != base.shape:
        raise CodecError(f"target has shape {list(target.shape)}; expected {list(base.shape)}")
    distance = np.subtract(target, base, dtype=np.float64)
    distance *= math.ldexp(1.0, -exponent)
    highest = float(np.abs(distance).max()) if distance.size else 0.0
    if not highest < K_LIMIT - 0.5:
        raise CodecError(
            f"parameters are {highest} steps of 2^{exponent} from the base; expected fewer than {K_LIMIT}: "
            "the model diverged, or the step is too fine"
        )
    k = np.rint(distance).astype(np.int32)
    if held is not None and reach > 0.5:
        before = _rescale(held, exponent)
        distance -= before
        np.copyto(k, before, where=np.abs(distance, out=distance) <= reach)
    state = LatticeState(exponent, k)
    return state, np.subtract(target, state.parameters(base), dtype=np.float64).astype(np.float32)


def refine(state: LatticeState, exponent: int) -> LatticeState:
    """The same model at a smaller exponent.

    Raises:
        CodecError: the exponent is larger, or a coordinate would reach 2^24.
    """
    if exponent > state.exponent:
        raise CodecError(f"lattice exponent cannot rise from {state.exponent} to {exponent}; expected a smaller one")
    return LatticeState(exponent, _rescale(state, exponent))


def choose_exponent(std: float, multiple: float, previous: int | None) -> int:
    """The power of two nearest to ``multiple * std``, as its logarithm, never above ``previous``.

    Args:
        std: standard deviation of a round's global update; where it is not positive and finite, ``previous`` (or 0)
            stays.
        multiple: how many of them make a step; 10 to 30 cost no visible accuracy.
        previous: the exponent so far, if any.
    """
    wanted = multiple * std
    if not 0 < wanted < math.inf:
        return 0 if previous is None else previous
    exponent = max(-EXPONENT_LIMIT, min(EXPONENT_LIMIT, round(math.log2(wanted))))
    return exponent if previous is None else min(exponent, previous)


def encode_delta(old: State, new: State, layout: Layout) -> bytes:
    """Bytes that lead a holder of ``old`` to ``new``, both of ``layout.size`` parameters.

    Raises:
        CodecError: the states do not fit the layout or each other.
    """
    _check_size(old, layout)
    _check_size(new, layout)
    digests = old.digest()[:_OLD] + new.digest()[:_NEW]
    if isinstance(new, RawState):
        return _DELTA + bytes([VERSION, _RAW]) + digests + new.values.astype("<f4", copy=False).tobytes()
    if isinstance(old, RawState):
        raise CodecError("a raw version has no exact delta to a lattice version; expected two versions of one codec")
    fine = new.exponent if old.highest == 0 else min(old.exponent, new.exponent)
    exponents = np.array((fine, new.exponent), np.int8).tobytes()
    bodies = []
    for block in blocks(layout):
        difference = _rescale(new, fine, block.where) - _rescale(old, fine, block.where)
        index = np.flatnonzero(difference)
        bodies.append(encode_levels(index, difference[index], block.layout))
    return _DELTA + bytes([VERSION, _LATTICE]) + digests + exponents + join(bodies)


def apply_delta(old: State, data: bytes, layout: Layout) -> State:
    """The state that ``data``, a delta for ``old``, leads to; ``old`` stays as it is.

    Raises:
        CodecError: the bytes are damaged, or lead from another state than ``old``.
    """
    _check_size(old, layout)
    reader = Reader(data, "delta")
    kind = _read_kind(reader, _DELTA)
    before, after = bytes(reader.take(_OLD)), bytes(reader.take(_NEW))
    if before != old.digest()[:_OLD]:
        raise CodecError(
            f"delta leads from version {before.hex()}; expected {old.digest()[:_OLD].hex()}, which is here: "
            "ask for the delta from the version that is held"
        )
    if kind == _RAW:
        return _verified(_read_raw(reader, layout), after, "delta")
    if isinstance(old, RawState):
        raise CodecError("delta is for a lattice version; expected one for a raw version, which is held")
    fine, exponent = np.frombuffer(reader.take(2), np.int8).tolist()
    if not -EXPONENT_LIMIT <= fine <= exponent <= EXPONENT_LIMIT:
        raise CodecError(f"delta is corrupt: exponents {fine} and {exponent}; fetch it again")
    k = _rescale(old, fine)
    for block, body in zip(blocks(layout), split(reader, layout), strict=True):
        index, level = decode_levels(body, block.layout, "delta")
        k[block.where][index] += level
    if exponent > fine:
        shift = min(exponent - fine, 31)
        if bool((k & np.int32(2**shift - 1)).any()):
            raise CodecError("delta is corrupt: it leads off the lattice; fetch it again")
        k >>= np.int32(shift)
    return _verified(LatticeState(exponent, k), after, "delta")


def pack_state(state: State) -> bytes:
    """A state on its own, compact, for the server's ledger and the device's store."""
    digest = state.digest()[:_NEW]
    if isinstance(state, RawState):
        return _STATE + bytes([VERSION, _RAW]) + digest + state.values.astype("<f4", copy=False).tobytes()
    exponent = np.int8(state.exponent).tobytes()
    bodies = []
    for block in blocks(_flat(state.k.size)):
        k = state.k[block.where]
        index = np.flatnonzero(k)
        bodies.append(encode_levels(index, k[index].astype(np.int32), block.layout))
    return _STATE + bytes([VERSION, _LATTICE]) + digest + exponent + join(bodies)


def unpack_state(data: bytes, layout: Layout) -> State:
    """Read what ``pack_state`` wrote, for a model of ``layout.size`` parameters.

    Raises:
        CodecError: the bytes are damaged or hold a state of another size.
    """
    reader = Reader(data, "state")
    kind = _read_kind(reader, _STATE)
    digest = bytes(reader.take(_NEW))
    if kind == _RAW:
        return _verified(_read_raw(reader, layout), digest, "state")
    (exponent,) = np.frombuffer(reader.take(1), np.int8).tolist()
    k = np.zeros(layout.size, np.int32)
    flat = _flat(layout.size)
    for block, body in zip(blocks(flat), split(reader, flat), strict=True):
        index, level = decode_levels(body, block.layout, "state")
        k[block.where][index] = level
    return _verified(LatticeState(exponent, k), digest, "state")


def _rescale(state: LatticeState, exponent: int, where: slice = slice(None)) -> npt.NDArray[np.int32]:
    """A new array: ``k`` in units of ``2^exponent``, which is not above the state's unless all ``k`` are zero."""
    if state.highest == 0 or exponent == state.exponent:
        return state.k[where].astype(np.int32)
    if exponent > state.exponent:
        raise CodecError(
            f"delta is corrupt: exponent {exponent} is above the version's {state.exponent}; fetch it again"
        )
    shift = state.exponent - exponent
    if state.highest << shift >= _SHIFT_LIMIT:
        raise CodecError(
            f"lattice coordinate {state.highest} does not bear {shift} halvings of the step; expected below 2^30 after"
        )
    return state.k[where].astype(np.int32) << np.int32(shift)


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
    if state.digest()[:_NEW] != digest:
        raise CodecError(
            f"{what} is corrupt: it leads to {state.digest().hex()[:16]}, not to {digest.hex()[:16]}; fetch it again"
        )
    return state


def _check_size(state: State, layout: Layout) -> None:
    size = state.k.size if isinstance(state, LatticeState) else state.values.size
    if size != layout.size:
        raise CodecError(f"version has {size} parameters; expected {layout.size}, those of the layout")


def _flat(size: int) -> Layout:
    return Layout((TensorSpec("k", (size,)),))
