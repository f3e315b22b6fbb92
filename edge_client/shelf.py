"""The model of a device where other programs find it: ``model/current`` below the device's state.

Each version is a folder of its own, ``infer.onnx``, ``weights.safetensors`` and ``model.json``, written under a name
that nothing refers to; then the symbolic link ``current`` is replaced in one rename. A reader that resolves the link
once reads one version, whole; the version before stays for readers that are at it.
"""

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy

from edge_client.bundle import INFER, WEIGHTS, Bundle
from edge_client.codec.model import Model
from edge_client.errors import StoreError
from edge_client.learning.own import Kind, OwnModel, Served
from edge_client.manifest import Feature

CURRENT = "current"
DESCRIPTION = "model.json"
_OURS = re.compile(r"v[0-9]+-[0-9a-f]{12}(\.new)?\Z")
_KEPT = 2
"""Versions that stay: the one that is current, and the one that readers may still be opening."""


class Description(msgspec.Struct, frozen=True):
    """What ``model.json`` says: which version this is, and what goes in and comes out."""

    version: int
    digest: str
    bundle: str
    name: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    targets: tuple[Feature, ...]
    constants: tuple[str, ...]
    """Tensors of ``weights.safetensors`` that are handed to the graph, as ``param.<name>``."""
    personal: Kind = ""
    """Why this is no longer the global model of that version: its personal layers are the device's own, it is the
    device's own by Ditto, or it was fine-tuned on the device's data."""


class Shelf:
    """Keeps the newest version in ``folder``.

    ``pause``: seconds for which a version stays current at least, as weights are written in full and SD cards wear out.
    ``wrote`` is told how many bytes went to the disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pause: float = 0.0,
        durable: bool = True,
        wrote: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._pause, self._durable, self._wrote = folder, pause, durable, wrote
        self._clock = clock
        self._last: float | None = None
        self._waiting: tuple[Bundle, Model, int, Served | None] | None = None
        self._lock = threading.Lock()

    def put(self, bundle: Bundle, model: Model, version: int, own: Served | None = None) -> None:
        """Make this version the current one, or the one that `catch_up` writes where another has to stay for now.

        ``own`` is what the device has for itself in place of ``model``.

        Raises:
            StoreError: the disk refuses; the version before stays.
        """
        with self._lock:
            if self._last is not None and self._clock() - self._last < self._pause:
                self._waiting = bundle, model, version, own
                return
            self._waiting = None
            self._put(bundle, model, version, own)

    def tuned(self, bundle: Bundle) -> bool:
        """Whether the current version is of this bundle and was fine-tuned: only a new task can make the next one."""
        with contextlib.suppress(OSError, ValueError):
            found = msgspec.json.decode((self._folder / CURRENT / DESCRIPTION).read_bytes(), type=Description)
            return found.bundle == bundle.digest and found.personal == "fine-tune"
        return False

    def catch_up(self, *, now: bool = False) -> None:
        """Write the version that waits, when the one before has stayed long enough, or ``now``.

        Raises:
            StoreError: the disk refuses; the version before stays.
        """
        with self._lock:
            waiting, last = self._waiting, self._last
            if waiting is not None and (now or last is None or self._clock() - last >= self._pause):
                self._waiting = None
                self._put(*waiting)

    def _put(self, bundle: Bundle, model: Model, version: int, own: Served | None) -> None:
        name = f"v{version}-{_digest(model, own).hex()[:12]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._current() == name:
                return
            self._write(self._folder / name, bundle, model, version, own)
            link = self._folder / (CURRENT + ".new")
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            os.replace(link, self._folder / CURRENT)
            self._sync(self._folder)
            self._last = self._clock()
            self._sweep(name)
        except OSError as error:
            raise StoreError(f"model folder {self._folder}: {error.strerror or error}; check its free space") from error

    def _current(self) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(self._folder / CURRENT)
        return ""

    def _write(self, place: Path, bundle: Bundle, model: Model, version: int, own: Served | None) -> None:
        manifest, temporary = bundle.manifest, place.with_name(place.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        temporary.mkdir()
        weights = {p.name: np.asarray(bundle.weights[p.name], order="C") for p in manifest.parameters}
        whole = OwnModel.joined(bundle, model) if own is None else own.model
        weights |= bundle.trained.views(whole.parameters)
        for name, view in bundle.tracked.views(whole.buffers).items():
            weights[name] = view.astype(weights[name].dtype)
        description = Description(
            version,
            model.digest().hex(),
            bundle.digest,
            manifest.name,
            manifest.inputs,
            manifest.outputs,
            manifest.targets,
            manifest.constants[INFER],
            "" if own is None else own.kind,
        )
        members = {
            INFER: bundle.infer,
            WEIGHTS: safetensors.numpy.save(weights),
            DESCRIPTION: msgspec.json.format(msgspec.json.encode(description)),
        }
        for name, data in members.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                if self._durable:
                    file.flush()
                    os.fsync(file.fileno())
            self._wrote(len(data))
        self._sync(temporary)
        os.replace(temporary, place)

    def _sweep(self, current: str) -> None:
        """Remove older versions; the newest of them stays, as a reader may just have followed the link to it."""
        found = [entry for entry in os.scandir(self._folder) if _OURS.match(entry.name) and entry.name != current]
        found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns, reverse=True)
        whole = [entry for entry in found if not entry.name.endswith(".new")]
        for entry in found:
            if entry not in whole[: _KEPT - 1]:
                shutil.rmtree(entry.path, ignore_errors=True)

    def _sync(self, folder: Path) -> None:
        if self._durable:
            opened = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(opened)
            finally:
                os.close(opened)


def _digest(model: Model, own: Served | None) -> bytes:
    """What tells two versions apart that are to be served."""
    if own is None:
        return model.digest()
    blake = hashlib.blake2b(model.digest(), digest_size=32)
    for vector in (own.model.parameters, own.model.buffers):
        blake.update(vector.data)
    return blake.digest()
