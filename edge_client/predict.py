"""Predictions with the newest model of a device, the global one or its own, for other programs on it.

::

    from edge_client.predict import Model

    model = Model.open("/var/lib/fedge/state/model")
    scores = model.predict(x=images)["logits"]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import safetensors.numpy

from edge_client import runtime
from edge_client.bundle import INFER, WEIGHTS
from edge_client.data import Array, fill
from edge_client.errors import BundleError, DataError
from edge_client.manifest import Feature
from edge_client.shelf import CURRENT, DESCRIPTION, Description

_TRIES = 5
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Model:
    """One version, loaded; it stays as it is when the device gets a newer one."""

    description: Description
    folder: Path
    """Where it was read from."""
    _session: Any

    @classmethod
    def open(cls, path: str | Path, *, threads: int = 1) -> Self:
        """Load the current version below ``path``: a device's ``model`` folder, its state folder, or one version.

        Raises:
            BundleError: there is no model yet, or it is damaged.
        """
        place = Path(path)
        candidates = [place / "model" / CURRENT, place / CURRENT, place]
        chosen = next((one for one in candidates if (one / DESCRIPTION).exists()), None)
        if chosen is None:
            raise BundleError(f"{place}: no model yet; a device has one from its first task on")
        for attempt in range(_TRIES):
            # The link is followed once: what is read below belongs to one version.
            folder = chosen.resolve()
            try:
                return cls._load(folder, threads)
            except FileNotFoundError as error:
                if attempt == _TRIES - 1:
                    raise BundleError(
                        f"{folder}: {error.strerror}; newer versions come faster than they load"
                    ) from error
        raise AssertionError

    @classmethod
    def _load(cls, folder: Path, threads: int) -> Self:
        try:
            description = msgspec.json.decode((folder / DESCRIPTION).read_bytes(), type=Description)
            weights = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
            graph = (folder / INFER).read_bytes()
            constants = {f"param.{name}": weights[name] for name in description.constants}
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise BundleError(
                f"{folder}: damaged ({error}); the device writes a new version with its next task"
            ) from error
        return cls(description, folder, runtime.session(graph, threads=threads, constants=constants))

    @property
    def version(self) -> int:
        """The version's number in its federation."""
        return self.description.version

    def predict(self, **inputs: object) -> dict[str, Array]:
        """The model's outputs, by name, ``[rows, ...]``, for inputs by name, a row for each sample.

        Inputs are converted as data is for training: integers given for a float input are scaled.

        Raises:
            DataError: an input is missing, or does not fit.
            TrainingError: the runtime failed.
        """
        parts = list(self._batches(inputs))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def classes(self, **inputs: object) -> list[str]:
        """For each sample the label of its highest score, or its number where the bundle names no labels."""
        (output,) = self.description.outputs[:1]
        # Classes come last, or first as PyTorch has them where there are several targets for a sample.
        several = [target.shape for target in self.description.targets if len(target.shape) == len(output.shape) - 1]
        first = bool(several) and output.shape[:-1] != several[0]
        best = self.predict(**inputs)[output.name].argmax(1 if first else -1).ravel()
        labels = output.labels or next((target.labels for target in self.description.targets), ())
        return [labels[index] if index < len(labels) else str(index) for index in best.tolist()]

    def _batches(self, inputs: Mapping[str, object]) -> Iterator[dict[str, Array]]:
        features = self.description.inputs
        given = {feature.name: np.asarray(inputs.get(feature.name)) for feature in features}
        rows = len(given[features[0].name]) if given[features[0].name].ndim else 0
        if missing := [feature.name for feature in features if inputs.get(feature.name) is None]:
            raise DataError(f"input {missing[0]!r} is missing; expected {', '.join(f.name for f in features)}")
        if not rows:
            raise DataError(f"no samples in {features[0].name!r}; expected a row for each")
        names = [value.name for value in self._session.get_outputs()]
        for start in range(0, rows, _BATCH):
            stop = min(rows, start + _BATCH)
            fed = {feature.name: _filled(given[feature.name], feature, start, stop) for feature in features}
            yield dict(zip(names, runtime.infer(self._session, fed), strict=True))


def _filled(array: Array, feature: Feature, start: int, stop: int) -> Array:
    out = np.empty((stop - start, *feature.shape), feature.dtype)
    fill(out, array[start:stop], feature)
    return out
