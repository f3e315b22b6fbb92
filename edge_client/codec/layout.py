"""Parameter names, shapes and order, and the flat float32 vector that they form."""

import hashlib
import math
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from edge_client.errors import CodecError

Vector = npt.NDArray[np.float32]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's place in a flat vector."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the tensor seen as ``[shape[0], rest]``; ``[1, size]`` below two dimensions."""
        rows = self.shape[0] if len(self.shape) > 1 and self.size > 0 else 1
        return rows, self.size // rows


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An ordered list of float32 tensors, laid end to end in one flat vector, each in C order."""

    tensors: tuple[TensorSpec, ...]

    @property
    def size(self) -> int:
        """Number of elements in the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def digest(self) -> bytes:
        """SHA-256 over names, shapes and order: two layouts with one digest hold the same tensors."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).digest()

    def slices(self) -> list[tuple[TensorSpec, slice]]:
        """Each tensor with its range in the flat vector, in order."""
        ranges, start = [], 0
        for tensor in self.tensors:
            ranges.append((tensor, slice(start, start + tensor.size)))
            start += tensor.size
        return ranges

    def views(self, vector: Vector) -> dict[str, Vector]:
        """Each tensor as a shaped view into ``vector`` (``[size] float32``): writing to one writes to the other."""
        self.check(vector)
        return {tensor.name: vector[where].reshape(tensor.shape) for tensor, where in self.slices()}

    def flatten(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Vector:
        """Copy named tensors into one new flat vector.

        Raises:
            CodecError: a tensor is missing, unknown, or of another shape or dtype.
        """
        if unknown := sorted(set(tensors) - {tensor.name for tensor in self.tensors}):
            raise CodecError(f"tensor {unknown[0]!r} is not in the layout")
        vector = np.empty(self.size, np.float32)
        for tensor, where in self.slices():
            found = tensors.get(tensor.name)
            if found is None:
                raise CodecError(f"tensor {tensor.name!r} is missing; expected float32 {list(tensor.shape)}")
            if found.shape != tensor.shape or found.dtype != np.float32:
                raise CodecError(
                    f"tensor {tensor.name!r} is {found.dtype} {list(found.shape)}; "
                    f"expected float32 {list(tensor.shape)}"
                )
            vector[where] = found.ravel()
        return vector

    def extract(self, vector: Vector, part: "Layout") -> Vector:
        """The tensors of ``part``, some of this layout's, as one vector: ``vector`` itself where they are all of them.

        Raises:
            CodecError: ``vector`` does not fit the layout.
        """
        self.check(vector)
        if part == self:
            return vector
        places = {tensor.name: where for tensor, where in self.slices()}
        found = np.empty(part.size, np.float32)
        for tensor, where in part.slices():
            found[where] = vector[places[tensor.name]]
        return found

    def insert(self, vector: Vector, part: "Layout", values: Vector) -> None:
        """Write ``values`` (``[part.size] float32``) to the places that the tensors of ``part`` have in ``vector``.

        Raises:
            CodecError: ``vector`` or ``values`` does not fit its layout.
        """
        self.check(vector)
        part.check(values)
        places = {tensor.name: where for tensor, where in self.slices()}
        for tensor, where in part.slices():
            vector[places[tensor.name]] = values[where]

    def check(self, vector: npt.NDArray[np.generic]) -> None:
        """Raise CodecError unless ``vector`` is ``[size] float32``."""
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise CodecError(f"vector is {vector.dtype} {list(vector.shape)}; expected float32 [{self.size}]")
