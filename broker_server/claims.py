"""What a client says of its evaluation, held against the number of samples that it says it has.

Nothing of it can be checked where the data stays on the device. But what one client claims is bounded by its samples,
and those by ``limits.samples``: no client outweighs others by more than it may say that it has.
"""

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edge_client.codec.layout import Layout, Vector
from edge_client.errors import CodecError
from edge_client.manifest import Manifest
from edge_client.reporting import FEATURES, LIMB, UNIT, columns, floats

Counts = npt.NDArray[np.int64]
GROUPS = ("", "personal")
"""What is measured: the global model, and the one that a client has for itself."""
SAMPLES_LIMIT = 2**29
"""More samples than this of one client are refused: their product with an update would not be exact any more."""
_SUM = re.compile(r"^(?:([a-z]+)\.)?sum\.(.+)\Z")
_HEAVIEST = 1000.0
"""How much one prediction may count: losses may weigh classes."""
_LARGEST = 1e9
"""Of a sum, for each of what is counted."""
_ROUNDING = 1e-5
"""Of float32, in which sums over a batch are made, and counts travel."""


def checked_samples(said: float) -> int:
    """The number of samples that a client says it has.

    Raises:
        CodecError: that is none, or too many.
    """
    if not 1 <= said < SAMPLES_LIMIT:
        raise CodecError(f"update counts {said:g} samples; expected 1 to {SAMPLES_LIMIT - 1}")
    return int(said)


def believed(scalars: Mapping[str, float], samples: float, manifest: Manifest, share: float) -> dict[str, float]:
    """The `believable` scalars, their sums by the ``share`` of its samples that the client counts as.

    Raises:
        CodecError: as there.
    """
    found = believable(scalars, samples, manifest)
    return {name: value * share if share < 1 and _SUM.match(name) else value for name, value in found.items()}


def trained(scalars: Mapping[str, float], samples: float, manifest: Manifest) -> dict[str, float]:
    """The `believable` scalars of a training task: its update is not refused for its metrics, they are left out."""
    try:
        return believable(scalars, samples, manifest)
    except CodecError:
        return {name: value for name, value in scalars.items() if not _SUM.match(name)}


def believable(scalars: Mapping[str, float], samples: float, manifest: Manifest) -> dict[str, float]:
    """The scalars without sums of unknown names: what a client makes up takes no memory and is no metric.

    Raises:
        CodecError: a count is not one of so many samples, or a sum is not one of so many counts.
    """
    known = {"loss", "count", *manifest.metrics}
    # What a loss counts may be places of its inputs, as where the next word is what is told.
    places = max(feature.size for feature in (*manifest.inputs, *manifest.targets))
    most = samples * places * _HEAVIEST
    found: dict[str, float] = {}
    for name, value in scalars.items():
        if (match := _SUM.match(name)) is None:
            found[name] = value
            continue
        group, total = match[1] or "", match[2]
        if group not in GROUPS or total not in known:
            continue
        count = scalars.get(name.removesuffix(total) + "count", 0.0)
        low, high = {"count": (0.0, most), "correct": (0.0, count)}.get(total, (-_LARGEST * count, _LARGEST * count))
        if not low <= value <= high * (1 + _ROUNDING):
            raise CodecError(
                f"update says that {name} is {value:g} with a count of {count:g} and {samples:g} samples; "
                f"expected {low:g} to {high:g}"
            )
        found[name] = value
    return found


def counted(
    vectors: Mapping[str, Vector], layouts: Mapping[str, Layout], samples: Mapping[str, float], manifest: Manifest
) -> dict[str, Counts]:
    """The vectors of an evaluation as whole numbers, ``[layout.size] int64`` each.

    ``vectors`` (``[layout.size] float32`` each) are as received; ``samples`` says of how many each is.

    Raises:
        CodecError: they are not counts of so many samples.
    """
    found = {}
    for name, vector in vectors.items():
        # All that float32 holds is whole from 2^24 on; int64 ends at 2^63, which many of these would pass together.
        if not (np.isfinite(vector) & (vector >= 0) & (vector == np.floor(vector)) & (vector < 2.0**53)).all():
            raise CodecError(f"update holds numbers in {name!r} that are no counts; expected whole ones of at least 0")
        found[name] = counts = vector.astype(np.int64)
        if name == FEATURES:
            _check_features(counts, layouts[name], samples[name], manifest)
        else:
            _check(name, counts.sum(dtype=np.float64), samples[name] * _places(manifest))
    return found


def scaled(counts: Counts, share: float, name: str, layout: Layout) -> Counts:
    """What is taken of the counts of a client that counts as a ``share`` of its samples: still whole numbers."""
    if share >= 1:
        return counts
    if name != FEATURES:
        return _part(counts, share)
    parts = []
    for tensor, where in layout.slices():
        rows = counts[where].reshape(tensor.shape).copy()
        rows[:, :-4] = _part(rows[:, :-4], share)
        whole = _part(rows[:, [-4, -2]] * LIMB + rows[:, [-3, -1]], share)
        rows[:, [-4, -2]], rows[:, [-3, -1]] = whole // LIMB, whole % LIMB
        parts.append(rows.ravel())
    return np.concatenate(parts)


def _part(counts: Counts, share: float) -> Counts:
    part: Counts = np.floor(counts * share).astype(np.int64)
    return part


def _check_features(counts: Counts, layout: Layout, samples: float, manifest: Manifest) -> None:
    sizes = {feature.name: feature.size // columns(feature) for feature in floats(manifest)}
    for tensor, where in layout.slices():
        rows = counts[where].reshape(tensor.shape)
        values = rows[:, :-4].sum(1, dtype=np.float64).max()
        _check(f"{FEATURES} of {tensor.name}", values, samples * sizes[tensor.name])
        inside = rows[:, 1:-5].sum(1) * float(UNIT)
        for place in (-4, -2):
            units = rows[:, place] * float(LIMB) + rows[:, place + 1]
            if (rows[:, place + 1] >= LIMB).any() or (units > inside * (1 + _ROUNDING) + 1).any():
                raise CodecError(f"update says sums of {tensor.name!r} beyond what so many values in the range come to")


def _check(name: str, found: float, most: float) -> None:
    if found > most * (1 + _ROUNDING):
        raise CodecError(f"update counts {found:.0f} in {name!r}; expected at most {most:g}, what its samples come to")


def _places(manifest: Manifest) -> int:
    """Targets of one sample, of the kind that has most."""
    return max((target.size for target in manifest.targets), default=1)
