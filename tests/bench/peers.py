"""Other kits that train on devices, each in an environment of its own; measured once for each case, beside the pairs.

Both can do less: a fixed batch, SGD alone, fewer layers. A case that one of them cannot do says why.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from federations import ROOT, BenchError, command


@dataclass(frozen=True)
class Peer:
    """How to install it, and the script that trains a case with it and prints what step_torch.py prints."""

    packages: tuple[str, ...]
    script: str
    sources: tuple[str, ...] = ()
    """Built with those packages from their source distributions, without what they say they need."""


PEERS = {
    "executorch": Peer(("executorch==1.5.1", "torch"), "step_executorch.py"),
    # The last release, of 2024; it wants what was current then.
    "ort_training": Peer(("onnxruntime-training-cpu==1.19.2", "onnx<1.17", "numpy<2", "torch"), "step_ort_training.py"),
}


class Environment:
    """A peer's virtual environment, made when first asked for."""

    def __init__(self, name: str, peer: Peer, folder: Path) -> None:
        self.name = name
        self.script = peer.script
        self._peer = peer
        self._folder = folder / name
        self._failure = ""

    def python(self) -> Path:
        """Its interpreter.

        Raises:
            BenchError: it cannot be installed here; pip is asked once.
        """
        if self._failure:
            raise BenchError(self._failure)
        wanted = " ".join(self._peer.packages + self._peer.sources)
        interpreter, complete = self._folder / "bin" / "python", self._folder / "complete"
        if complete.exists() and complete.read_text() == wanted:
            return interpreter
        shutil.rmtree(self._folder, ignore_errors=True)
        log = self._folder.with_suffix(".txt")
        try:
            command([sys.executable, "-m", "venv", str(self._folder)], log)
            pip = [str(interpreter), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
            command([*pip, *self._peer.packages], log, timeout=1800.0)
            if self._peer.sources:
                built = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", *self._peer.sources]
                command([*pip, *built], log, timeout=1800.0)
        except BenchError as error:
            self._failure = f"not installed here: {error}"
            raise BenchError(self._failure) from error
        complete.write_text(wanted)
        return interpreter
