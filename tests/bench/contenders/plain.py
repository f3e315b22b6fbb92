"""What needs no paper: half precision, and eight bits and a general-purpose compressor."""

from collections.abc import Sequence

import numpy as np
import zstandard

from contenders.points import Floats, Point, noise


def fp16(vector: Floats) -> list[Point]:
    """Sixteen bits each."""
    return [(16.0, noise(vector, vector.astype(np.float16)))]


def int8_zstd(vector: Floats, sizes: Sequence[int]) -> list[Point]:
    """Each tensor (of these ``sizes``) in 255 levels of its largest magnitude, all of them compressed by zstd -19."""
    levels, decoded = [], []
    for piece in np.split(vector, np.cumsum(sizes)[:-1]):
        step = float(np.abs(piece).max(initial=0.0)) / 127 or 1.0
        levels.append(np.rint(piece / step).astype(np.int8))
        decoded.append(levels[-1] * step)
    packed = zstandard.ZstdCompressor(level=19).compress(np.concatenate(levels).tobytes())
    return [((8 * len(packed) + 32 * len(sizes)) / vector.size, noise(vector, np.concatenate(decoded)))]
