"""What a session starts from: what the client holds, and how it behaves."""

from dataclasses import dataclass

from edge_client.upload import Pending
from edge_client.wire import messages as m
from edge_client.wire import transfer

NO_HASH = bytes(32)
BLOB_LIMIT = 512 * 2**20
"""Bytes of the largest blob that a client takes."""


@dataclass(frozen=True)
class Held:
    """What a client holds when it starts, as its store remembers it."""

    bundle: bytes = NO_HASH
    version: int = 0
    digest: bytes = NO_HASH
    pending: Pending | None = None
    samples: int = 0
    partial: transfer.Assembly | None = None
    """The blob that was on its way down."""


@dataclass(frozen=True)
class SessionSettings:
    """How a client behaves; sizes in bytes, times in seconds."""

    client: str
    federation: str
    software: str = ""
    uplink: float = 0.0
    """Bytes a second that the client can send; 0 is not known, and the last upload in chunks tells."""
    window: int = transfer.WINDOW
    blob_limit: int = BLOB_LIMIT
    keep: int = 2**20
    """Blobs from this size on are kept chunk by chunk, and taken up again after a restart."""
    chunk: int = 64 * 1024
    inline: int = m.INLINE_LIMIT
    patience: float = 5.0
    """Without an answer for this long, say it again; doubles each time, up to ``longest``."""
    longest: float = 300.0
