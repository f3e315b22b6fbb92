"""Data behind a gate: training on it waits until a test opens the named pipe that ``FEDGE_GATE`` names."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.data import ArraySource


class Gated(ArraySource):
    """Arrays whose first batch waits for the gate, for as long as there is one."""

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Any]]:
        """Wait, then the batches."""
        gate = Path(os.environ["FEDGE_GATE"])
        if gate.exists():
            gate.read_bytes()
        yield from super().batches(size, seed=seed)


def gated() -> Gated:
    """The samples that ``FEDGE_GATE_DATA`` names."""
    with np.load(os.environ["FEDGE_GATE_DATA"]) as arrays:
        return Gated(dict(arrays))
