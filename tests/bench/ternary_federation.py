"""Federated learning with sparse ternary compression in both directions.

Clients keep what compression leaves out; so does the server, which compresses the mean of the updates before it sends
it. A client that missed rounds receives the sum of their updates, which the server keeps for every number of rounds
(Algorithm 2 and section V-C of Sattler, Wiedemann, Mueller, Samek: "Robust and Communication-Efficient Federated
Learning from Non-IID Data", 2019). Clients weigh in by their samples, as with the other contenders.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from contenders.stc import Ternary, compress
from loopback import Loopback

from edge_client.codec.layout import Vector


def train(federation: Loopback, rounds: int, share: float) -> Iterator[tuple[Vector, int]]:
    """After each round the model, and the bytes of all updates and downloads in it."""
    size = federation.bundle.layout.size
    model = federation.bundle.initial()
    residuals: dict[int, Vector] = {}
    remainder = np.zeros(size)
    history: list[Ternary] = []
    held: dict[int, int] = {}
    for number in range(1, rounds + 1):
        total, weight, bits = np.zeros(size), 0, 0
        missed = [held.get(phone, 0) for phone in federation.asked(number)]
        sums = {version: partial_sum_bits(history[version:], size) for version in set(missed)}
        bits += sum(sums[version] for version in missed)
        for phone, delta, samples in federation.deltas(model, number):
            vector = delta + residuals.get(phone, np.float32(0))
            sent = compress(vector, share)
            decoded = sent.decode()
            residuals[phone] = (vector - decoded).astype(np.float32)
            held[phone] = len(history)
            total += samples * decoded
            weight += samples
            bits += sent.bits()
        step = remainder + total / weight
        history.append(compress(step, share))
        decoded = history[-1].decode()
        remainder = step - decoded
        model = (model + decoded).astype(np.float32)
        yield model, math.ceil(bits / 8)


def partial_sum_bits(updates: Sequence[Ternary], size: int) -> int:
    """Bits that lead over these updates: each by itself, or the positions and the entropy of their sum, or float32."""
    if not updates:
        return 0
    alone = sum(update.bits() for update in updates)
    total = np.zeros(size)
    for update in updates:
        total[update.index] += update.sign * update.magnitude
    index = np.flatnonzero(total)
    return min(alone, _position_bits(index) + _value_bits(total[index]), 32 * size)


def _position_bits(index: npt.NDArray[np.int64]) -> int:
    """As ``Ternary.bits`` has them, without the signs."""
    return Ternary(0, index, np.zeros(0), 0.0).bits() - len(index)


def _value_bits(values: npt.NDArray[np.float64]) -> int:
    """Their entropy and a table of them, float32."""
    _, counts = np.unique(values.astype(np.float32), return_counts=True)
    return math.ceil(-(counts * np.log2(counts / counts.sum())).sum()) + 32 * len(counts)
