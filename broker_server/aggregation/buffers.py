"""Buffers of several clients: floats (running statistics) become their mean by samples, integers their maximum."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.streaming import PartialSum
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Vector
from edge_client.errors import CodecError
from edge_client.manifest import Manifest

_MEAN = fedavg()


@dataclass(frozen=True, slots=True)
class BufferSum:
    """What has been added so far: the floats' sum, and the highest value of every buffer, ``[m] float32``."""

    mean: PartialSum
    highest: Vector


@dataclass(frozen=True, slots=True)
class BufferAggregator:
    """``init -> add* -> finish``; ``whole`` (``[m] bool``) tells which values are integers."""

    whole: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, manifest: Manifest) -> "BufferAggregator":
        """For a bundle's buffers, in the manifest's order."""
        dtypes = {p.name: p.dtype for p in manifest.parameters}
        layout = manifest.layout("buffer")
        whole = np.zeros(layout.size, bool)
        for tensor, where in layout.slices():
            whole[where] = not dtypes[tensor.name].startswith("float")
        return cls(whole)

    def init(self) -> BufferSum:
        """Nothing yet."""
        return BufferSum(_MEAN.init(self.whole.size), np.full(self.whole.size, -np.inf, np.float32))

    def add(self, state: BufferSum, buffers: Vector, samples: int) -> BufferSum:
        """One more client's buffers, ``[m] float32``, finite; ``state`` may be written into.

        Raises:
            CodecError: they are of another length.
        """
        if buffers.shape != self.whole.shape:
            raise CodecError(f"update has {buffers.size} buffer values; expected {self.whole.size}")
        mean = _MEAN.add(state.mean, buffers, Report(samples=samples, weight=float(samples)))
        return BufferSum(mean, np.maximum(state.highest, buffers))

    def finish(self, state: BufferSum) -> Vector:
        """The aggregate, ``[m] float32``.

        Raises:
            TrainingError: nothing was added.
        """
        return np.where(self.whole, state.highest, _MEAN.finish(state.mean)).astype(np.float32)
