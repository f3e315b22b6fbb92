"""Blobs in chunks: split, put together, verify."""

import hashlib

from edge_client.errors import WireError
from edge_client.wire.messages import INLINE_LIMIT, BlobRef


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


class Assembly:
    """One blob under way: takes its chunks in any order, knows what is missing, and hands out only verified bytes.

    Raises:
        WireError: the blob is empty (it would travel inside its reference), or larger than ``limit`` bytes. Nothing is
            allocated then.
    """

    def __init__(self, ref: BlobRef, *, limit: int) -> None:
        if not 0 < ref.size <= limit:
            raise WireError(f"blob of {ref.size} bytes; 1 to {limit} are accepted here")
        self.ref = ref
        self._data = bytearray(ref.size)
        self._missing = dict.fromkeys(range(count(ref)))

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return not self._missing

    def missing(self, most: int | None = None) -> tuple[int, ...]:
        """Indices of the first ``most`` chunks that are not there, ascending; of all of them by default."""
        indices = iter(self._missing)
        return tuple(indices) if most is None else tuple(index for index, _ in zip(indices, range(most), strict=False))

    def add(self, index: int, data: bytes) -> bool:
        """Take one chunk; False when it is there already or does not belong to this blob."""
        if index not in self._missing:
            return False
        start = index * self.ref.chunk
        if len(data) != min(self.ref.chunk, self.ref.size - start):
            return False
        self._data[start : start + len(data)] = data
        del self._missing[index]
        return True

    def take(self) -> bytes:
        """The whole blob.

        Raises:
            WireError: a chunk is missing, or the bytes are not those that the reference names.
        """
        if self._missing:
            raise WireError(f"blob has {len(self._missing)} of {count(self.ref)} chunks missing")
        return _verified(bytes(self._data), self.ref)

    def restart(self) -> None:
        """Forget every chunk, after a blob turned out not to be what its reference names."""
        self._missing = dict.fromkeys(range(count(self.ref)))


def _verified(data: bytes, ref: BlobRef) -> bytes:
    found = hashlib.sha256(data).digest()
    if len(data) != ref.size or found != ref.sha256:
        raise WireError(
            f"blob of {len(data)} bytes has SHA-256 {found.hex()[:12]}; "
            f"{ref.size} bytes with {ref.sha256.hex()[:12]} were named"
        )
    return data
