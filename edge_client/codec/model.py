"""A version of the global model: its parameters (`versions`) and its buffers, which travel as they are.

Buffers (running statistics, counters) are float32 whatever their dtype, outside codes and residual. A model without
any has exactly the bytes and the digest of its parameters.

The bytes are *models with buffers* in ``FORMAT.md``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.versions import CodedState, State, apply_delta, encode_delta, pack_state, unpack_state
from edge_client.errors import CodecError

VERSION = 1
_MAGIC = b"FB"
_DIGEST = 16


@dataclass(frozen=True, eq=False)
class Model:
    """``state``: the parameters; ``buffers``: ``[m] float32``, seen read-only. Equal digests are equal models."""

    state: State
    buffers: Vector

    def __post_init__(self) -> None:
        if self.buffers.dtype != np.float32 or self.buffers.ndim != 1:
            raise CodecError(f"buffers are {self.buffers.dtype} {list(self.buffers.shape)}; expected float32 [m]")
        view = self.buffers.view()
        view.setflags(write=False)
        object.__setattr__(self, "buffers", view)

    def parameters(self, base: Vector) -> Vector:
        """The published parameters (``[n] float32``, new); ``base`` is the bundle's."""
        return self.state.parameters(base)

    def digest(self) -> bytes:
        """32 bytes that name this version."""
        return self._digest

    def at_rest(self) -> "Model":
        """The same version, in as little memory as it needs."""
        return Model(self.state.at_rest(), self.buffers)

    @cached_property
    def _digest(self) -> bytes:
        if not self.buffers.size:
            return self.state.digest()
        blake = hashlib.blake2b(b"B" + self.state.digest(), digest_size=32)
        blake.update(_bytes(self.buffers))
        return blake.digest()


def untrained(layout: Layout, buffers: Vector) -> Model:
    """Version 0 of a model with this layout: the bundle's weights, and its first values of the buffers."""
    return Model(CodedState(layout), buffers)


def encode_model_delta(old: Model, new: Model) -> bytes:
    """Bytes that lead a holder of ``old`` to ``new``; buffers are sent in full.

    Raises:
        CodecError: the models do not fit each other.
    """
    return _framed(encode_delta(old.state, new.state), new)


def apply_model_delta(old: Model, data: bytes, layout: Layout) -> Model:
    """The model that ``data``, a delta for ``old``, leads to.

    Raises:
        CodecError: the bytes are damaged, or lead from another model than ``old``.
    """
    found = _unframed(data, "delta", lambda inner: apply_delta(old.state, inner, layout))
    if found.buffers.size != old.buffers.size:
        raise CodecError(f"delta has {found.buffers.size} buffer values; expected {old.buffers.size}: other bundle?")
    return found


def pack_model(model: Model) -> bytes:
    """A model on its own, compact, for the server's ledger and the device's store."""
    return _framed(pack_state(model.state), model)


def unpack_model(data: bytes, layout: Layout) -> Model:
    """Read what ``pack_model`` wrote, for a model of ``layout.size`` parameters.

    Raises:
        CodecError: the bytes are damaged or hold a model of another size.
    """
    return _unframed(data, "model", lambda inner: unpack_state(inner, layout))


def _bytes(buffers: Vector) -> bytes:
    return buffers.astype("<f4", copy=False).tobytes()


def _framed(inner: bytes, model: Model) -> bytes:
    if not model.buffers.size:
        return inner
    head = _MAGIC + bytes([VERSION]) + varint(len(inner))
    return b"".join([head, inner, _bytes(model.buffers), model.digest()[:_DIGEST]])


def _unframed(data: bytes, what: str, read: Callable[[bytes], State]) -> Model:
    if data[:2] != _MAGIC:
        return Model(read(data), np.zeros(0, np.float32))
    reader = Reader(data, what)
    reader.take(2)
    if (version := reader.take(1)[0]) != VERSION:
        raise CodecError(f"{what} has format version {version}; expected {VERSION}: update the older side")
    inner, rest = reader.section(), reader.rest()
    if len(rest) <= _DIGEST or len(rest) % 4:
        raise CodecError(f"{what} is corrupt: {len(rest)} bytes of buffers and digest; fetch it again")
    buffers = np.frombuffer(rest[:-_DIGEST], "<f4").astype(np.float32)
    found = Model(read(bytes(inner)), buffers)
    if found.digest()[:_DIGEST] != bytes(rest[-_DIGEST:]):
        raise CodecError(f"{what} is corrupt: its buffers are not those that its digest names; fetch it again")
    return found
