"""Blobs in chunks: split, put together, verify."""

import hashlib

from edge_client.errors import WireError
from edge_client.wire.messages import INLINE_LIMIT, BlobRef

WINDOW = 16
"""Chunks that a client subscribes to at a time, unless told otherwise, and that it may miss at once."""


def refer(data: bytes, *, chunk: int, inline: int = INLINE_LIMIT) -> BlobRef:
    """Name ``data`` by its hash; it travels inside the reference when it has at most ``inline`` bytes."""
    within = bytes(data) if len(data) <= min(inline, INLINE_LIMIT) else None
    return BlobRef(hashlib.sha256(data).digest(), len(data), chunk, within)


def count(ref: BlobRef) -> int:
    """Number of chunks of a blob."""
    return -(-ref.size // ref.chunk)


def piece(data: bytes, ref: BlobRef, index: int) -> bytes:
    """Chunk ``index`` of ``data``, empty where there is none."""
    return data[index * ref.chunk : (index + 1) * ref.chunk]


def unwrap(ref: BlobRef) -> bytes | None:
    """The verified bytes of a blob that travelled inside its reference, None for one that travels in chunks.

    Raises:
        WireError: the bytes are not those that the reference names.
    """
    if ref.inline is None:
        return None
    return _verified(ref.inline, ref)


class Checklist:
    """Which chunks of a blob have come: one byte for each.

    Raises:
        WireError: the blob is empty (it would travel inside its reference), or larger than ``limit`` bytes. Nothing is
            allocated then.
    """

    def __init__(self, ref: BlobRef, *, limit: int) -> None:
        if not 0 < ref.size <= limit:
            raise WireError(f"blob of {ref.size} bytes; 1 to {limit} are accepted here")
        self.ref = ref
        self._come = bytearray(count(ref))
        self.left = len(self._come)
        """How many have not."""

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return not self.left

    def lacks(self, index: int) -> bool:
        """Whether there is a chunk of that index, and it has not come."""
        return 0 <= index < len(self._come) and not self._come[index]

    def missing(self, most: int | None = None) -> tuple[int, ...]:
        """Indices of the first ``most`` chunks that are not there, ascending; of all of them by default."""
        found: list[int] = []
        at = -1
        while (most is None or len(found) < most) and (at := self._come.find(0, at + 1)) >= 0:
            found.append(at)
        return tuple(found)

    def fits(self, index: int, size: int) -> bool:
        """Whether ``size`` is that of the chunk."""
        return size == min(self.ref.chunk, self.ref.size - index * self.ref.chunk)

    def mark(self, index: int, size: int) -> bool:
        """One chunk has come; False when it is there already or does not belong to this blob."""
        if not self.lacks(index) or not self.fits(index, size):
            return False
        self._come[index] = 1
        self.left -= 1
        return True

    def restart(self) -> None:
        """Forget every chunk, after a blob turned out not to be what its reference names."""
        self._come = bytearray(count(self.ref))
        self.left = len(self._come)


class Assembly(Checklist):
    """One blob under way: takes its chunks in any order, knows what is missing, and hands out only verified bytes.

    Raises:
        WireError: as `Checklist`.
    """

    def __init__(self, ref: BlobRef, *, limit: int) -> None:
        super().__init__(ref, limit=limit)
        self._data = bytearray(ref.size)

    def add(self, index: int, data: bytes) -> bool:
        """Take one chunk; False when it is there already or does not belong to this blob."""
        if not self.mark(index, len(data)):
            return False
        start = index * self.ref.chunk
        self._data[start : start + len(data)] = data
        return True

    def take(self) -> bytes:
        """The whole blob.

        Raises:
            WireError: a chunk is missing, or the bytes are not those that the reference names.
        """
        if self.left:
            raise WireError(f"blob has {self.left} of {count(self.ref)} chunks missing")
        return _verified(bytes(self._data), self.ref)


def _verified(data: bytes, ref: BlobRef) -> bytes:
    found = hashlib.sha256(data).digest()
    if len(data) != ref.size or found != ref.sha256:
        raise WireError(
            f"blob of {len(data)} bytes has SHA-256 {found.hex()[:12]}; "
            f"{ref.size} bytes with {ref.sha256.hex()[:12]} were named"
        )
    return data
