"""Sparse ternary compression: the largest fraction p of the values is sent as plus or minus their mean magnitude, and
the distances between them as Golomb codes.

Sattler, Wiedemann, Mueller, Samek: "Robust and Communication-Efficient Federated Learning from Non-IID Data", 2019.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contenders.points import Floats, Point, noise

SHARES = tuple(float(f"{10**exponent:.3g}") for exponent in np.arange(-4, 0.01, 0.125))
HEADER = 64
"""Bits: the magnitude, float32, and the number of values."""


@dataclass(frozen=True, eq=False)
class Ternary:
    """``index`` ``[k] int64``, ascending; ``sign`` ``[k]``; all have the same ``magnitude``."""

    size: int
    index: npt.NDArray[np.int64]
    sign: npt.NDArray[np.float64]
    magnitude: float

    def decode(self) -> npt.NDArray[np.float64]:
        """The ternary vector, ``[size]``."""
        vector = np.zeros(self.size)
        vector[self.index] = self.sign * self.magnitude
        return vector

    def bits(self) -> int:
        """Length: a sign and a Golomb-Rice code of each distance, with the parameter that is best for them."""
        gaps = np.diff(self.index, prepend=-1) - 1
        codes = [int((gaps >> shift).sum()) + len(gaps) * (1 + shift) for shift in range(32)]
        return HEADER + len(gaps) + min(codes)


def compress(vector: Floats, share: float) -> Ternary:
    """The largest ``max(n * share, 1)`` magnitudes."""
    count = max(round(share * vector.size), 1)
    magnitude = np.abs(vector)
    index = np.sort(np.argpartition(magnitude, vector.size - count)[vector.size - count :])
    return Ternary(vector.size, index, np.sign(vector[index]).astype(np.float64), float(magnitude[index].mean()))


def points(vector: Floats, sizes: Sequence[int]) -> list[Point]:
    """Of the vector as one, and of each of its tensors (of these ``sizes``) by itself."""
    found = []
    for parts in {(vector.size,), tuple(sizes)}:
        pieces = np.split(vector, np.cumsum(parts)[:-1])
        for share in SHARES:
            sent = [compress(piece, share) for piece in pieces]
            decoded = np.concatenate([one.decode() for one in sent])
            found.append((sum(one.bits() for one in sent) / vector.size, noise(vector, decoded)))
    return found
