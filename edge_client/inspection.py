"""What a device looks for in a graph before the runtime sees any of it: standard operators alone, and no files.

A graph is a protocol buffer (onnx.proto, ONNX IR specification). Devices have no onnx package, and the runtime tells
only after it has loaded a graph what it is; so the few fields that matter are read here. All else is skipped, unread.
"""

from collections.abc import Collection, Iterator

import numpy as np

from edge_client.bundle import EVAL, INFER, TRAIN, Bundle
from edge_client.errors import BundleError

_DEFAULT_DOMAIN = ("", "ai.onnx")
_HANDED_OVER = b"fedge"
"""Where the export says that constants are whose values are handed over in memory."""
_DEEPEST = 16
"""Graphs within graphs (loops and branches)."""

# Field numbers, and what they lead to.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_OPSET_DOMAIN = 1
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def inspect(bundle: Bundle, *, memory_limit: int = 0) -> None:
    """Refuse a bundle that a device should not run.

    ``memory_limit`` is in bytes; 0 is no limit.

    Raises:
        BundleError: a graph names a file, an operator outside the ONNX standard or functions of its own, or is no
            graph; or the bundle declares that it needs more memory than there is to be used.
    """
    for name, graph in ((TRAIN, bundle.train), (EVAL, bundle.eval), (INFER, bundle.infer)):
        constants = {f"param.{constant}".encode() for constant in bundle.manifest.constants[name]}
        try:
            _inspect_model(memoryview(graph), constants)
        except BundleError as error:
            raise BundleError(f"{name} {error}; export it again with a fedge that you trust") from error
    needed = declared_memory(bundle)
    if memory_limit and needed > memory_limit:
        raise BundleError(
            f"the bundle declares that it needs {needed / 2**20:.0f} MiB, the limit here is "
            f"{memory_limit / 2**20:.0f} MiB: export it with a smaller --memory-budget, or raise the limit"
        )


def declared_memory(bundle: Bundle) -> int:
    """Bytes that training takes by what the manifest says: the step, the weights, the copies of them, the optimizer."""
    manifest = bundle.manifest
    everything = sum(
        int(np.prod(parameter.shape, dtype=np.int64)) * np.dtype(parameter.dtype).itemsize
        for parameter in manifest.parameters
    )
    trained = 4 * bundle.trained.size
    copies = 1 + len(manifest.optimizer.slots) + manifest.proximal + manifest.control
    return manifest.memory + everything + trained * copies


def _inspect_model(data: memoryview, constants: Collection[bytes]) -> None:
    for field, value in _fields(data):
        if field in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise BundleError("brings functions of its own")
        if field == _MODEL_GRAPH:
            _inspect_graph(_message(value), constants, 0)
        elif field == _MODEL_OPSETS:
            for inner, domain in _fields(_message(value)):
                if inner == _OPSET_DOMAIN:
                    _check_domain(domain, "operators")


def _inspect_graph(data: memoryview, constants: Collection[bytes], depth: int) -> None:
    if depth > _DEEPEST:
        raise BundleError(f"nests graphs more than {_DEEPEST} deep")
    for field, value in _fields(data):
        if field == _GRAPH_NODE:
            _inspect_node(_message(value), depth)
        elif field == _GRAPH_INITIALIZER:
            _inspect_tensor(_message(value), constants)
        elif field == _GRAPH_SPARSE:
            _inspect_sparse(_message(value))


def _inspect_node(data: memoryview, depth: int) -> None:
    operator = ""
    domains = []
    for field, value in _fields(data):
        if field == _NODE_OPERATOR:
            operator = bytes(_message(value)).decode("utf-8", "replace")
        elif field == _NODE_DOMAIN:
            domains.append(value)
        elif field == _NODE_ATTRIBUTE:
            _inspect_attribute(_message(value), depth)
    for domain in domains:
        _check_domain(domain, f"operator {operator[:60]!r}")


def _inspect_attribute(data: memoryview, depth: int) -> None:
    for field, value in _fields(data):
        if field in _ATTRIBUTE_GRAPHS:
            _inspect_graph(_message(value), (), depth + 1)
        elif field in _ATTRIBUTE_TENSORS:
            _inspect_tensor(_message(value), ())
        elif field in _ATTRIBUTE_SPARSE:
            _inspect_sparse(_message(value))


def _inspect_sparse(data: memoryview) -> None:
    for field, value in _fields(data):
        if field in _SPARSE_TENSORS:
            _inspect_tensor(_message(value), ())


def _inspect_tensor(data: memoryview, constants: Collection[bytes]) -> None:
    """Its data is inside, or it is one of ``constants``, whose values are handed over."""
    name, external, entries = b"", False, []
    for field, value in _fields(data):
        if field == _TENSOR_NAME:
            name = bytes(_message(value))
        elif field == _TENSOR_LOCATION:
            external = external or value != 0
        elif field == _TENSOR_EXTERNAL:
            entries.append({key: bytes(_message(text)) for key, text in _fields(_message(value))})
    if not external and not entries:
        return
    for entry in entries:
        if entry != {_ENTRY_KEY: b"location", _ENTRY_VALUE: _HANDED_OVER}:
            where = entry.get(_ENTRY_VALUE, b"").decode("utf-8", "replace")[:60]
            raise BundleError(f"names the file {where!r} for tensor {name.decode('utf-8', 'replace')[:60]!r}")
    if name not in constants:
        raise BundleError(f"has no value for tensor {name.decode('utf-8', 'replace')[:60]!r}")


def _check_domain(value: "memoryview | int", what: str) -> None:
    domain = bytes(_message(value)).decode("utf-8", "replace")
    if domain not in _DEFAULT_DOMAIN:
        raise BundleError(f"names {what} of the domain {domain[:60]!r}; expected those of the ONNX standard alone")


def _message(value: "memoryview | int") -> memoryview:
    if isinstance(value, int):
        raise BundleError("is no ONNX graph: a number is where a part of it should be")
    return value


def _fields(data: memoryview) -> "Iterator[tuple[int, memoryview | int]]":
    """The fields of one protocol buffer message: number, and bytes or an integer."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            if size > end - at:
                raise BundleError("is no ONNX graph, or is cut")
            yield key >> 3, data[at : at + size]
            at += size
        elif kind == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
            if at > end:
                raise BundleError("is no ONNX graph, or is cut")
        else:
            raise BundleError("is no ONNX graph, or is cut")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise BundleError("is no ONNX graph, or is cut")
