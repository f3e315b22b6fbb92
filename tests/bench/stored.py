"""An update as it is kept in a file, which every contender reads; this module loads little, as memory is measured."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.codec.layout import Layout, TensorSpec, Vector


@dataclass(frozen=True, eq=False)
class Update:
    """``vector``: ``[layout.size] float32``, what a client encodes."""

    vector: Vector
    layout: Layout

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [tensor.size for tensor in self.layout.tensors]

    def write(self, path: Path) -> None:
        """Keep it as ``vector`` and, in JSON, ``tensors``: ``[name, shape]`` of each."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        tensors = [[tensor.name, tensor.shape] for tensor in self.layout.tensors]
        np.savez(partial, vector=self.vector, tensors=json.dumps(tensors))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Update":
        """What ``write`` kept."""
        with np.load(path) as file:
            vector, tensors = file["vector"], json.loads(str(file["tensors"]))
        return cls(vector, Layout(tuple(TensorSpec(name, tuple(shape)) for name, shape in tensors)))
