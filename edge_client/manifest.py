"""What a bundle says of itself: ``manifest.json`` as typed structs.

A bundle (``*.fedge``) is a zip, stored without compression, that holds ``manifest.json``, ``train.onnx``,
``eval.onnx``, ``infer.onnx`` and ``weights.safetensors``. It holds no code and no pickle.

Graph inputs and outputs follow one naming scheme:

=====================  ==================================================================================
``param.<tensor>``     parameter or buffer. Those that a step changes are inputs of ``train.onnx``. All others, and
                       in the other two graphs all that they use, are constants whose values are handed over when
                       the graph is loaded, or stored in it where ``constants`` does not name them
``next.<tensor>``      its value after the step, output of ``train.onnx``
``slot.<slot>.<t>``    optimizer state (say ``slot.momentum.fc.weight``), float32 of the tensor's shape, input
``next.<slot>.<t>``    its value after the step, output of ``train.onnx``
``anchor.<tensor>``    the model as received, where the proximal term was exported for; input of ``train.onnx``
``control.<tensor>``   added to the gradient, where control variates were exported for; input of ``train.onnx``
``step``               int64 scalar, 1, 2, 3, ... within a task; input of ``train.onnx`` where the graph uses it
``seed``               int64 scalar of a task, from 0 to 2^31 - 1; input of ``train.onnx`` where the graph uses it
``hyper.<name>``       a float32 scalar (shape ``[]``), input of ``train.onnx``
``<input name>``       the batch, as the manifest's ``inputs`` and ``targets`` name it; first dimension symbolic
``loss``               mean loss of the batch, float32 scalar, output of ``train.onnx``
``sum.<metric>``       sum over the batch, float32 scalar, output of ``train.onnx`` and ``eval.onnx``;
                       ``sum.loss`` and ``sum.count`` are always outputs of ``eval.onnx``
``<output name>``      the model's outputs, outputs of ``infer.onnx``
=====================  ==================================================================================

Each ``next.*`` may have the memory of the value that it replaces: in ``train.onnx`` the node that writes it depends on
all others that read that value.
"""

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import BundleError

FORMAT = 3

Role = Literal["trainable", "frozen", "personal", "buffer", "personal-buffer"]
"""The personal ones are trained as the others are, and never leave the device."""
NORM = "norm"
"""In place of a pattern: all of the layers that keep running statistics."""
_SHOWN = 40
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the model. All trainable and personal ones are float32."""

    name: str
    shape: tuple[int, ...]
    role: Role
    dtype: str = "float32"


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One batch input, target or output: its shape without the batch dimension, and what its values mean."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]
    scale: float = 1.0
    """Integer data (such as uint8 pixels) given for a float32 input is multiplied by this on the device."""
    labels: tuple[str, ...] = ()
    """Names of the classes, where the feature is a class index or a row of class scores."""

    @property
    def size(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)


class Hyper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scalar input of the training graph, with its default."""

    name: str
    default: float


class Optimizer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The update rule inside ``train.onnx``; ``slots`` name its state, a tensor for each parameter that is trained."""

    name: str
    slots: tuple[str, ...] = ()


class Parity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far ONNX Runtime and PyTorch were apart when the bundle was written."""

    worst_relative_error: float
    tolerance: float
    cases: int
    torch: str
    onnxruntime: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds and how its graphs are fed."""

    format: int
    name: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[Feature, ...]
    targets: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    loss: str
    metrics: tuple[str, ...]
    """Names of the sums that eval.onnx returns beside ``loss`` and ``count``, such as ``correct``."""
    optimizer: Optimizer
    hypers: tuple[Hyper, ...]
    proximal: bool
    """Whether train.onnx takes ``anchor.*`` inputs and ``hyper.mu``."""
    control: bool
    """Whether train.onnx takes ``control.*`` inputs."""
    constants: dict[str, tuple[str, ...]]
    """For each graph, the parameters whose values are handed over when it is loaded."""
    opset: int
    least_runtime: str
    files: dict[str, Digest]
    parity: Parity | None = None
    memory: Annotated[int, Meta(ge=0)] = 0
    """Bytes that a training step is planned to need beside the model, the batch and the results; 0: not declared."""

    def layout(self, *roles: Role) -> Layout:
        """The layout of all parameters of the given roles, in the manifest's order; by default trainable ones."""
        wanted = roles or ("trainable",)
        return Layout(tuple(TensorSpec(p.name, p.shape) for p in self.parameters if p.role in wanted))

    def defaults(self) -> dict[str, float]:
        """Every hyperparameter by name, with its default; ``mu`` of a proximal bundle is 0 unless it says otherwise."""
        return ({"mu": 0.0} if self.proximal else {}) | {hyper.name: hyper.default for hyper in self.hypers}


def update_layouts(manifest: Manifest) -> dict[str, Layout]:
    """The vectors of a training task's update: ``delta``, and ``buffers`` where the model has any."""
    buffers = manifest.layout("buffer")
    return {"delta": manifest.layout()} | ({"buffers": buffers} if buffers.size else {})


def with_personal(manifest: Manifest, patterns: Sequence[str]) -> Manifest:
    """The manifest with all trained parameters and buffers personal that match a pattern (as in `fnmatch`).

    `NORM` stands for the parameters and running statistics of layers such as batch normalisation (FedBN, Li et al.
    2021, arXiv 2102.07623).

    Raises:
        BundleError: a pattern matches nothing that is trained, or nothing is left to share.
    """
    roles: dict[str, Role] = {"trainable": "personal", "buffer": "personal-buffer"}
    known = {p.name: p.role for p in manifest.parameters if p.role != "frozen"}
    chosen: set[str] = set()
    for pattern in patterns:
        found = _normalizing(known) if pattern == NORM else {name for name in known if fnmatchcase(name, pattern)}
        if not found:
            what = "no layer keeps running statistics" if pattern == NORM else "it matches no parameter that is trained"
            raise BundleError(f"personal layers {pattern!r}: {what}; expected a pattern of {_listed(known)}")
        chosen |= found
    parameters = tuple(
        msgspec.structs.replace(p, role=roles.get(p.role, p.role)) if p.name in chosen else p
        for p in manifest.parameters
    )
    if not any(p.role == "trainable" for p in parameters):
        raise BundleError(
            f"personal layers {', '.join(map(repr, patterns))} leave nothing to share; "
            f"expected some of {_listed(known)} not to match"
        )
    return msgspec.structs.replace(manifest, parameters=parameters)


def _normalizing(known: Iterable[str]) -> set[str]:
    """Names of what belongs to layers that have a running mean."""
    names = list(known)
    layers = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == "running_mean"}
    return {name for name in names if name.rpartition(".")[0] in layers}


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
