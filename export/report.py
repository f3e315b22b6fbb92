"""What an export made and found: sizes, times, parity, and how each convolution is computed."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from edge_client.errors import ExportError
from edge_client.manifest import Manifest, Parity, Role
from export.training import Memory


class Convolution(msgspec.Struct, frozen=True):
    """How the convolutions of one kind are computed, with their gradients."""

    layer: str
    """Channels, kernel, image, stride and groups, as ``16->32 3x3 on 8x8``."""
    formulation: str
    milliseconds: dict[str, float] = {}
    """Of a batch of 32, by formulation; empty where nothing was measured."""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in self.milliseconds.items())
        return f"{self.layer}: {self.formulation}" + (f" ({times})" if times else "")


@dataclass(frozen=True)
class Report:
    """What an export made; times are those of the machine that made it, which are no part of the bundle."""

    manifest: Manifest
    path: Path
    sizes: dict[str, int]
    """Bytes of each member."""
    seconds: float
    """That the export took, verification included."""
    load_ms: dict[str, float]
    """Milliseconds to make a session of each graph."""
    tuned: bool
    """Whether formulations of convolutions were measured where several suit."""
    convolutions: Sequence[Convolution]
    memory: Memory
    """What a training step is planned to need."""

    @property
    def parity(self) -> Parity:
        """How far PyTorch and ONNX Runtime were apart."""
        assert self.manifest.parity is not None
        return self.manifest.parity

    def to_json(self) -> bytes:
        """The report as JSON; all but the manifest, which the bundle holds."""
        manifest = self.manifest
        counted = {role: manifest.layout(role).size for role in get_args(Role)}
        fields = {
            "name": manifest.name,
            "bundle": str(self.path),
            "parameters": {role: count for role, count in counted.items() if count},
            "sizes": self.sizes,
            "seconds": round(self.seconds, 2),
            "load_ms": self.load_ms,
            "parity": self.parity,
            "machine": f"{platform.system()} {platform.machine()}",
            "tuned": self.tuned,
            "convolutions": self.convolutions,
            "memory": self.memory,
        }
        return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"

    def write(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            ExportError: the file cannot be written.
        """
        try:
            path.write_bytes(self.to_json())
        except OSError as error:
            raise ExportError(f"--report {path}: {error.strerror}; name a file that can be written") from error
