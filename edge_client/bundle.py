"""Open and verify a model bundle (``*.fedge``): a zip, stored without compression, of a manifest, graphs and weights.

Nothing of a bundle is believed before it is checked: sizes before bytes are read, bytes against the manifest's SHA-256,
weights against its parameters. Weights stay where they are in the file's bytes; they are not copied.
"""

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt

from edge_client.codec.layout import Layout, Vector
from edge_client.errors import BundleError
from edge_client.manifest import FORMAT, Feature, Manifest, Parameter

MANIFEST = "manifest.json"
TRAIN = "train.onnx"
EVAL = "eval.onnx"
INFER = "infer.onnx"
WEIGHTS = "weights.safetensors"

LIMITS = {MANIFEST: 4 << 20, TRAIN: 256 << 20, EVAL: 256 << 20, INFER: 256 << 20, WEIGHTS: 2 << 30}
"""The members, all of them, and the most bytes that each may have."""

DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
"""dtypes that parameters may have, with their names in safetensors."""

_LIMIT = sum(LIMITS.values())
_AGAIN = "fetch or export the bundle again"


class _Format(msgspec.Struct):
    format: int


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle."""

    manifest: Manifest
    digest: str
    """SHA-256 of the whole file, in hexadecimal: the bundle's name on the wire."""
    train: bytes
    eval: bytes
    infer: bytes
    weights: Mapping[str, npt.NDArray[np.generic]]
    """Every parameter's first value, by name: read-only views into the file's bytes, which may be unaligned."""

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Read and verify the file at ``path``.

        Raises:
            BundleError: it cannot be read, or is no intact bundle.
        """
        try:
            with Path(path).open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                if size > _LIMIT:
                    raise BundleError(f"{path}: {size} bytes are more than a bundle's {_LIMIT}; is it another file?")
                file.seek(0)
                data = file.read()
        except OSError as error:
            raise BundleError(
                f"{path}: cannot be read ({error.strerror}); give the path of a file made by `fedge export`"
            ) from error
        try:
            return cls.from_bytes(data)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "Bundle":
        """Verify a bundle's bytes; the weights are views into ``data``.

        Raises:
            BundleError: the bytes are no intact bundle of a format that this version reads.
        """
        members = _members(data)
        manifest = _manifest(bytes(members[MANIFEST]))
        for name in (TRAIN, EVAL, INFER, WEIGHTS):
            found = hashlib.sha256(members[name]).hexdigest()
            if found != manifest.files[name]:
                raise BundleError(
                    f"{name} has SHA-256 {found[:16]}..., the manifest says {manifest.files[name][:16]}...: "
                    f"the bundle is damaged; {_AGAIN}"
                )
        return cls(
            manifest=manifest,
            digest=hashlib.sha256(data).hexdigest(),
            train=bytes(members[TRAIN]),
            eval=bytes(members[EVAL]),
            infer=bytes(members[INFER]),
            weights=_weights(members[WEIGHTS], manifest.parameters),
        )

    @property
    def layout(self) -> Layout:
        """The layout of the trainable parameters: what travels, less the buffers."""
        return self.manifest.layout()

    @property
    def trained(self) -> Layout:
        """The layout of all parameters that a step updates: the trainable ones, and those that stay on the device."""
        return self.manifest.layout("trainable", "personal")

    @property
    def tracked(self) -> Layout:
        """The layout of all buffers that a step changes: those that travel, and those that stay on the device."""
        return self.manifest.layout("buffer", "personal-buffer")

    @property
    def kept(self) -> Layout:
        """The layout of what stays on the device: parameters and buffers."""
        return self.manifest.layout("personal", "personal-buffer")

    def initial(self) -> Vector:
        """The untrained model: a new ``[layout.size] float32`` vector of the trainable parameters."""
        return self.first(self.layout)

    def initial_buffers(self) -> Vector:
        """First values of the buffers that travel, float32 whatever their dtype: a new flat vector."""
        return self.first(self.manifest.layout("buffer"))

    def first(self, layout: Layout) -> Vector:
        """First values of parameters and buffers, float32 whatever their dtype: a new ``[layout.size]`` vector."""
        vector = np.empty(layout.size, np.float32)
        for tensor, where in layout.slices():
            vector[where] = self.weights[tensor.name].ravel()
        return vector


def write_members(file: IO[bytes], members: Mapping[str, bytes | memoryview]) -> None:
    """Write a bundle's members to ``file``; the same members give the same bytes, whenever they are written."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), data)


def manifest_bytes(manifest: Manifest) -> bytes:
    """``manifest.json``."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def with_manifest(data: bytes, change: Callable[[Manifest], Manifest]) -> bytes:
    """The bundle of these bytes with another manifest; all else in it stays.

    Raises:
        BundleError: the bytes are no intact bundle, or ``change`` refuses.
    """
    manifest = Bundle.from_bytes(data).manifest
    file = io.BytesIO()
    write_members(file, {**_members(data), MANIFEST: manifest_bytes(change(manifest))})
    return file.getvalue()


def _members(data: bytes) -> dict[str, memoryview]:
    """The members' bytes, as views into ``data``."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"this is not a bundle, or it is truncated ({error}); {_AGAIN}") from error
    names = [member.filename for member in listed]
    if sorted(names) != sorted(LIMITS):
        odd = sorted(set(LIMITS) - set(names)) or sorted(set(names) - set(LIMITS)) or names
        state = "lacks" if odd[0] in LIMITS and odd[0] not in names else "has an unexpected or repeated"
        raise BundleError(
            f"this is a zip but not a bundle: it {state} member {odd[0]!r:.100}; give a file made by `fedge export`"
        )
    found = {}
    for member in listed:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise BundleError(f"{name} is compressed, a bundle's members are stored as they are; {_AGAIN}")
        if member.file_size > LIMITS[name]:
            raise BundleError(f"{name} claims {member.file_size} bytes, more than the allowed {LIMITS[name]}; {_AGAIN}")
        found[name] = _stored(data, member)
        # The manifest's hash is nowhere inside the bundle; the other members' are in the manifest.
        if name == MANIFEST and zlib.crc32(found[name]) != member.CRC:
            raise BundleError(f"{name} does not have the checksum that the zip gives: it is damaged; {_AGAIN}")
    return found


def _stored(data: bytes, member: zipfile.ZipInfo) -> memoryview:
    """The bytes of one stored member; zipfile itself would copy them."""
    start = member.header_offset
    header = data[start : start + 30] if start >= 0 else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise BundleError(f"{member.filename} is not where the zip's directory says: the bundle is damaged; {_AGAIN}")
    begin = start + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if begin + member.file_size > len(data):
        raise BundleError(
            f"{member.filename} claims {member.file_size} bytes, {max(0, len(data) - begin)} are there: "
            f"the bundle is truncated; {_AGAIN}"
        )
    return memoryview(data)[begin : begin + member.file_size]


def _manifest(data: bytes) -> Manifest:
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise BundleError(
                f"the bundle has format {found}, this version of fedge reads format {FORMAT}; "
                + ("update fedge" if found > FORMAT else "export the model again")
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST} is not a manifest ({error}); {_AGAIN}") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """What the types of the manifest cannot say."""
    if set(manifest.files) != {TRAIN, EVAL, INFER, WEIGHTS}:
        raise BundleError(f"{MANIFEST} gives hashes of {sorted(manifest.files)}, not of the four others; {_AGAIN}")
    if set(manifest.constants) != {TRAIN, EVAL, INFER}:
        raise BundleError(f"{MANIFEST} gives constants of {sorted(manifest.constants)}, not of the graphs; {_AGAIN}")
    known = {parameter.name for parameter in manifest.parameters}
    for graph, constants in manifest.constants.items():
        if unknown := sorted(set(constants) - known):
            raise BundleError(f"{MANIFEST} names {unknown[0]!r}, a constant of {graph}, as no parameter; {_AGAIN}")
    for what, names in {
        "parameter": [p.name for p in manifest.parameters],
        "hyper": [h.name for h in manifest.hypers],
        "input or target": [f.name for f in (*manifest.inputs, *manifest.targets)],
        "optimizer slot": list(manifest.optimizer.slots),
        "metric": list(manifest.metrics),
    }.items():
        if len(set(names)) != len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise BundleError(f"{MANIFEST} names {what} {repeated!r} more than once; {_AGAIN}")
    kinds = ", ".join(DTYPES)
    for parameter in manifest.parameters:
        if parameter.dtype not in DTYPES or (
            parameter.role in ("trainable", "personal") and parameter.dtype != "float32"
        ):
            raise BundleError(
                f"{parameter.role} parameter {parameter.name!r} is {parameter.dtype}; "
                f"expected {'float32' if parameter.role in ('trainable', 'personal') else f'one of {kinds}'}"
                "; export the model again"
            )
    shapes: list[Parameter | Feature] = [*manifest.parameters, *manifest.inputs, *manifest.targets]
    for shaped in shapes:
        if any(side < 0 for side in shaped.shape) or math.prod(shaped.shape) > LIMITS[WEIGHTS]:
            raise BundleError(f"{shaped.name!r} has the impossible shape {list(shaped.shape)}; {_AGAIN}")
    if not manifest.inputs or not any(p.role == "trainable" for p in manifest.parameters):
        raise BundleError(f"{MANIFEST} names no input or no trainable parameter: nothing to train; {_AGAIN}")


def _weights(data: memoryview, parameters: tuple[Parameter, ...]) -> dict[str, npt.NDArray[np.generic]]:
    """Views of the tensors in a safetensors file that must hold ``parameters`` and nothing else.

    The safetensors library copies every tensor; the format is a length (8 bytes, little-endian), a JSON header and
    the data, so reading it in place is little work. https://huggingface.co/docs/safetensors
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise BundleError(f"{WEIGHTS} is not a safetensors file: its header would end beyond the file; {_AGAIN}")
    try:
        header = msgspec.json.decode(data[8 : 8 + length], type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{WEIGHTS} is not a safetensors file ({error}); {_AGAIN}") from error
    body = data[8 + length :]
    if odd := sorted(set(tensors) ^ {parameter.name for parameter in parameters}):
        state = "holds the unknown tensor" if odd[0] in tensors else "lacks parameter"
        raise BundleError(f"{WEIGHTS} {state} {odd[0]!r}; it must hold what {MANIFEST} names; {_AGAIN}")
    weights = {}
    for parameter in parameters:
        tensor, dtype = tensors[parameter.name], np.dtype(parameter.dtype).newbyteorder("<")
        begin, end = tensor.data_offsets
        if tensor.dtype != DTYPES[parameter.dtype] or tensor.shape != parameter.shape:
            raise BundleError(
                f"{WEIGHTS}: tensor {parameter.name!r} is {tensor.dtype} {list(tensor.shape)}; "
                f"{MANIFEST} says {DTYPES[parameter.dtype]} {list(parameter.shape)}; {_AGAIN}"
            )
        if not 0 <= begin <= end <= len(body) or end - begin != math.prod(parameter.shape) * dtype.itemsize:
            raise BundleError(f"{WEIGHTS}: tensor {parameter.name!r} claims bytes {begin} to {end}; {_AGAIN}")
        weights[parameter.name] = np.frombuffer(body[begin:end], dtype).reshape(parameter.shape)
    return weights
