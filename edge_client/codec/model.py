"""A version of the global model: its parameters (`versions`), its buffers, and the control variate that goes with it.

Buffers (running statistics, counters) are float32 whatever their dtype, outside codes and residual, and travel as they
are. A model without buffers and control has exactly the bytes and the digest of its parameters.

The bytes are *models with buffers* and *models with a control* in ``FORMAT.md``.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_client.codec.control import check_control, decode_control
from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.versions import CodedState, State, apply_delta, encode_delta, pack_state, unpack_state
from edge_client.errors import CodecError

VERSION = 1
_BUFFERS, _CONTROL = b"FB", b"FV"
_DIGEST = 16


@dataclass(frozen=True, eq=False)
class Model:
    """``state``: the parameters; ``buffers``: ``[m] float32``, seen read-only. Equal digests are equal models.

    ``control`` are the bytes of a `control`; none are a vector of zeros.
    """

    state: State
    buffers: Vector
    control: bytes = b""

    def __post_init__(self) -> None:
        if self.buffers.dtype != np.float32 or self.buffers.ndim != 1:
            raise CodecError(f"buffers are {self.buffers.dtype} {list(self.buffers.shape)}; expected float32 [m]")
        view = self.buffers.view()
        view.setflags(write=False)
        object.__setattr__(self, "buffers", view)

    def parameters(self, base: Vector) -> Vector:
        """The published parameters (``[n] float32``, new); ``base`` is the bundle's."""
        return self.state.parameters(base)

    def control_vector(self, layout: Layout) -> Vector | None:
        """The control variate (``[layout.size] float32``, new); None is zeros.

        Raises:
            CodecError: its bytes are damaged.
        """
        return decode_control(self.control, layout)

    def digest(self) -> bytes:
        """32 bytes that name this version."""
        return self._digest

    def at_rest(self) -> "Model":
        """The same version, in as little memory as it needs."""
        return Model(self.state.at_rest(), self.buffers, self.control)

    @cached_property
    def _digest(self) -> bytes:
        digest = self.state.digest()
        if self.buffers.size:
            digest = _over(b"B", digest, _bytes(self.buffers))
        return _over(b"V", digest, self.control) if self.control else digest


def untrained(layout: Layout, buffers: Vector) -> Model:
    """Version 0 of a model with this layout: the bundle's weights, and its first values of the buffers."""
    return Model(CodedState(layout), buffers)


def encode_model_delta(old: Model, new: Model) -> bytes:
    """Bytes that lead a holder of ``old`` to ``new``; buffers and control are sent in full.

    Raises:
        CodecError: the models do not fit each other.
    """
    return _framed(encode_delta(old.state, new.state), new)


def apply_model_delta(old: Model, data: bytes, layout: Layout) -> Model:
    """The model that ``data``, a delta for ``old``, leads to.

    Raises:
        CodecError: the bytes are damaged, or lead from another model than ``old``.
    """
    found = _unframed(data, "delta", layout, lambda inner: apply_delta(old.state, inner, layout))
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
    return _unframed(data, "model", layout, lambda inner: unpack_state(inner, layout))


def _bytes(buffers: Vector) -> bytes:
    return buffers.astype("<f4", copy=False).tobytes()


def _over(what: bytes, digest: bytes, data: bytes) -> bytes:
    blake = hashlib.blake2b(what + digest, digest_size=32)
    blake.update(data)
    return blake.digest()


def _framed(inner: bytes, model: Model) -> bytes:
    if model.buffers.size:
        inner = _frame(_BUFFERS, inner, _bytes(model.buffers), Model(model.state, model.buffers).digest())
    return _frame(_CONTROL, inner, model.control, model.digest()) if model.control else inner


def _frame(magic: bytes, inner: bytes, more: bytes, digest: bytes) -> bytes:
    return b"".join([magic, bytes([VERSION]), varint(len(inner)), inner, more, digest[:_DIGEST]])


def _unframed(data: bytes, what: str, layout: Layout, read: Callable[[bytes], State]) -> Model:
    inner, control, digest = _parts(data, _CONTROL, what, "control") if data[:2] == _CONTROL else (data, b"", b"")
    check_control(control, layout, what)
    found = _with_buffers(inner, what, read)
    if not control:
        return found
    found = Model(found.state, found.buffers, control)
    if found.digest()[:_DIGEST] != digest:
        raise CodecError(f"{what} is corrupt: its control is not the one that its digest names; fetch it again")
    return found


def _with_buffers(data: bytes, what: str, read: Callable[[bytes], State]) -> Model:
    if data[:2] != _BUFFERS:
        return Model(read(data), np.zeros(0, np.float32))
    inner, rest, digest = _parts(data, _BUFFERS, what, "buffers")
    if len(rest) % 4:
        raise CodecError(f"{what} is corrupt: {len(rest)} bytes of buffers; fetch it again")
    found = Model(read(inner), np.frombuffer(rest, "<f4").astype(np.float32))
    if found.digest()[:_DIGEST] != digest:
        raise CodecError(f"{what} is corrupt: its buffers are not those that its digest names; fetch it again")
    return found


def _parts(data: bytes, magic: bytes, what: str, more: str) -> tuple[bytes, bytes, bytes]:
    """What is inside a frame, what it adds, and the digest at its end."""
    reader = Reader(data, what)
    reader.take(len(magic))
    if (version := reader.take(1)[0]) != VERSION:
        raise CodecError(f"{what} has format version {version}; expected {VERSION}: update the older side")
    inner, rest = reader.section(), reader.rest()
    if len(rest) <= _DIGEST:
        raise CodecError(f"{what} is corrupt: {len(rest)} bytes of {more} and digest; fetch it again")
    return bytes(inner), bytes(rest[:-_DIGEST]), bytes(rest[-_DIGEST:])
