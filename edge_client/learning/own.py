"""The model of one device: what it shares with all others, and what stays with it."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout, Vector
from edge_client.codec.model import Model
from edge_client.codec.quantize import peak
from edge_client.errors import CodecError
from edge_client.learning.remembered import pack_vector, unpack_vector

Kind = Literal["", "layers", "ditto", "fine-tune"]
"""Why a model is a device's own; empty where it is the global one."""
LAYERS = "layers"
"""The memory of a device that holds its personal layers."""
DITTO = "ditto"
"""The memory of a device that holds a whole model of its own."""


@dataclass(frozen=True, eq=False)
class OwnModel:
    """All that training changes on a device.

    ``parameters``: ``[bundle.trained.size] float32``; ``buffers``: ``[bundle.tracked.size] float32``.
    """

    parameters: Vector
    buffers: Vector

    @classmethod
    def joined(cls, bundle: Bundle, model: Model, kept: Vector | None = None) -> "OwnModel":
        """The global model with what a device keeps (``[bundle.kept.size] float32``), the bundle's own unless given."""
        shared = model.parameters(bundle.initial())
        if not bundle.kept.size:
            return cls(shared, model.buffers)
        whole = cls(bundle.first(bundle.trained), bundle.first(bundle.tracked))
        bundle.trained.insert(whole.parameters, bundle.layout, shared)
        bundle.tracked.insert(whole.buffers, bundle.manifest.layout("buffer"), model.buffers)
        if kept is not None:
            personal, statistics = bundle.manifest.layout("personal"), bundle.manifest.layout("personal-buffer")
            bundle.trained.insert(whole.parameters, personal, bundle.kept.extract(kept, personal))
            bundle.tracked.insert(whole.buffers, statistics, bundle.kept.extract(kept, statistics))
        return whole

    def copy(self) -> "OwnModel":
        """The same values, in memory of its own."""
        return OwnModel(self.parameters.copy(), self.buffers.copy())

    @property
    def finite(self) -> bool:
        """Whether it did not diverge."""
        return math.isfinite(peak(self.parameters)) and math.isfinite(peak(self.buffers))

    def shared(self, bundle: Bundle) -> tuple[Vector, Vector]:
        """The parameters and the buffers that travel."""
        buffers = bundle.manifest.layout("buffer")
        return bundle.trained.extract(self.parameters, bundle.layout), bundle.tracked.extract(self.buffers, buffers)

    def kept(self, bundle: Bundle) -> Vector:
        """What stays on the device, ``[bundle.kept.size] float32``."""
        personal, statistics = bundle.manifest.layout("personal"), bundle.manifest.layout("personal-buffer")
        kept = np.empty(bundle.kept.size, np.float32)
        bundle.kept.insert(kept, personal, bundle.trained.extract(self.parameters, personal))
        bundle.kept.insert(kept, statistics, bundle.tracked.extract(self.buffers, statistics))
        return kept

    def packed(self, bundle: Bundle) -> bytes:
        """All of it for the store.

        Raises:
            CodecError: it is not finite.
        """
        return pack_vector(np.concatenate([self.parameters, self.buffers]), _everything(bundle))

    @classmethod
    def unpacked(cls, data: bytes, bundle: Bundle) -> "OwnModel":
        """What `packed` made.

        Raises:
            CodecError: the bytes are damaged, or of another bundle.
        """
        both = unpack_vector(data, _everything(bundle))
        return cls(both[: bundle.trained.size], both[bundle.trained.size :])


@dataclass(frozen=True, eq=False)
class Served:
    """A model that a device has for itself and uses in place of the global one."""

    model: OwnModel
    kind: Kind


def remembered_layers(bundle: Bundle, recall: Callable[[str], bytes | None]) -> Vector | None:
    """What a device keeps of the personal layers; None before its first training, and where it cannot be read."""
    data = recall(LAYERS)
    with contextlib.suppress(CodecError):
        return None if data is None else unpack_vector(data, bundle.kept)
    return None


def remembered_model(bundle: Bundle, recall: Callable[[str], bytes | None]) -> OwnModel | None:
    """The whole model that a device keeps for itself; None where there is none, or none that can be read."""
    data = recall(DITTO)
    with contextlib.suppress(CodecError):
        return None if data is None else OwnModel.unpacked(data, bundle)
    return None


def stored(bundle: Bundle, model: Model, recall: Callable[[str], bytes | None]) -> Served | None:
    """What a device serves after a start, beside ``model``, the global one that it holds; None where that one is it."""
    own = remembered_model(bundle, recall)
    if own is not None:
        return Served(own, "ditto")
    if bundle.kept.size:
        return Served(OwnModel.joined(bundle, model, remembered_layers(bundle, recall)), "layers")
    return None


def _everything(bundle: Bundle) -> Layout:
    return Layout(bundle.trained.tensors + bundle.tracked.tensors)
