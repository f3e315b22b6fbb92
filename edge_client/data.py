"""Data sources: where a device's samples come from, and what they must look like.

A source is anything with :class:`DataSource`'s two members. Arrays are the plain case; :func:`open_data` makes one from
an ``.npz`` file, a folder of CSV files or a function of the user's.
"""

import csv
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edge_client.errors import DataError
from edge_client.manifest import Feature, Manifest

Array = npt.NDArray[np.generic]
Arrays = Mapping[str, Array]

_BLOCK = 1 << 20
_ROUNDING = 1e-9
"""A third of three samples is one."""


@runtime_checkable
class DataSource(Protocol):
    """Batches of samples, by feature name (the bundle's inputs and targets)."""

    @property
    def samples(self) -> int:
        """Number of samples."""
        ...

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Array]]:
        """One pass over all samples, ``size`` at a time; the last batch may be smaller.

        ``seed`` None gives them in order; any other, at least 0, in an order that it alone decides.
        """
        ...


@runtime_checkable
class Splittable(DataSource, Protocol):
    """A source that can keep some of its samples aside."""

    def apart(self, share: float) -> tuple[DataSource, DataSource | None]:
        """What is left and what is kept aside: about ``share`` of the samples, and the same ones every time.

        Nothing is kept aside (None) where there is too little for it.
        """
        ...


class ArraySource:
    """Samples in memory: arrays with one row a sample, by feature name.

    Integer arrays stay as they are (say uint8 pixels); batches are converted when they are fed. ``rows``
    (``[n] int64``) picks samples without copying them, so that many clients can share one set of arrays.

    Raises:
        DataError: no arrays, arrays of different lengths, or none left by ``rows``.
    """

    def __init__(self, arrays: Arrays, rows: npt.NDArray[np.int64] | None = None) -> None:
        self.arrays = dict(arrays)
        self.rows = rows
        lengths = {name: len(array) if array.ndim else 0 for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no arrays"
            raise DataError(f"expected arrays with as many samples each, found {found}")
        self._total = next(iter(lengths.values()))
        if self.samples == 0:
            raise DataError(f"no samples in {', '.join(lengths)}; at least one is needed")

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._total if self.rows is None else len(self.rows)

    def subset(self, rows: npt.NDArray[np.int64]) -> "ArraySource":
        """The samples numbered ``rows`` (``[n] int64``) of this source; the arrays are shared.

        Raises:
            DataError: there are none, or a number is out of range.
        """
        if rows.size and not 0 <= rows.min() <= rows.max() < self.samples:
            raise DataError(f"rows {rows.min()} to {rows.max()} asked for; there are {self.samples}")
        return ArraySource(self.arrays, rows if self.rows is None else self.rows[rows])

    def apart(self, share: float) -> tuple["ArraySource", "ArraySource | None"]:
        """See :class:`Splittable`. Of each ``1 / share`` samples in a row, one that a fixed seed draws is kept aside.

        So samples in any order are kept aside evenly, and those added at the end leave the others where they are. Fewer
        than ``1 / share`` samples keep none aside.
        """
        count = int(self.samples * share + _ROUNDING)
        if not count:
            return self, None
        edges = (np.arange(count + 1) / share + _ROUNDING).astype(np.int64)
        within = np.random.default_rng(0).random(count) * np.diff(edges)
        aside = np.zeros(self.samples, np.bool_)
        aside[edges[:-1] + within.astype(np.int64)] = True
        return self.subset(np.flatnonzero(~aside)), self.subset(np.flatnonzero(aside))

    def batches(self, size: int, *, seed: int | None) -> Iterator[dict[str, Array]]:
        """One pass over all samples; see :class:`DataSource`. Batches may be views: they are for reading."""
        order = self.rows
        if seed is not None:
            shuffled = np.random.default_rng(seed).permutation(self.samples)
            order = shuffled if order is None else order[shuffled]
        for start in range(0, self.samples, size):
            if order is None:
                yield {name: array[start : start + size] for name, array in self.arrays.items()}
            else:
                chosen = order[start : start + size]
                yield {name: array.take(chosen, axis=0) for name, array in self.arrays.items()}


def split(source: ArraySource, fraction: float, seed: int) -> tuple[ArraySource, ArraySource]:
    """Hold out ``fraction`` of the samples, at least one, drawn by ``seed``: ``(train, validation)``.

    Raises:
        DataError: the fraction is not between 0 and 1, or leaves no sample to train on.
    """
    if not 0 < fraction < 1:
        raise DataError(f"cannot hold out a fraction of {fraction}; expected more than 0 and less than 1")
    held = max(1, round(source.samples * fraction))
    if held >= source.samples:
        raise DataError(f"holding out {fraction} of {source.samples} samples leaves none to train on; bring more")
    order = np.random.default_rng(seed).permutation(source.samples)
    return source.subset(np.sort(order[held:])), source.subset(np.sort(order[:held]))


def open_data(spec: str, manifest: Manifest) -> DataSource:
    """The source that ``spec`` names, checked against the bundle.

    Args:
        spec: a path of an ``.npz`` file with one array for each input and target; a folder of ``.csv`` files whose
            header row names the columns: ``y``, or ``y.0``, ``y.1`` ..., for a target named ``y``, the others in order
            making up the one input; or ``module:function``, a function without arguments that returns such arrays or a
            :class:`DataSource`. The working directory is searched for the module first.
        manifest: the bundle's.

    Raises:
        DataError: it cannot be read, is empty, or does not fit the bundle.
    """
    path = Path(spec)
    found = _folder(path, manifest) if path.is_dir() else _load(spec)
    if not isinstance(found, Mapping):
        return found
    arrays: Arrays = found
    try:
        check(arrays, manifest)
    except DataError as error:
        raise DataError(f"data {spec!r}: {error}") from error
    return ArraySource({feature.name: arrays[feature.name] for feature in (*manifest.inputs, *manifest.targets)})


def load_arrays(spec: str) -> Arrays:
    """The arrays that ``spec`` (an ``.npz`` file or ``module:function``) names, before there is a bundle to fit.

    Raises:
        DataError: they cannot be read, or the function returns no arrays.
    """
    found = _load(spec)
    if not isinstance(found, Mapping):
        raise DataError(f"data {spec!r} is a data source of its own; expected arrays, which can be split")
    return found


def _load(spec: str) -> Arrays | DataSource:
    path = Path(spec)
    if path.suffix == ".npz":
        return read_npz(path)
    if ":" in spec and "/" not in spec:
        return _call(spec)
    raise DataError(
        f"data {spec!r} is neither an .npz file, a folder of .csv files nor module:function; "
        "check the path and the working directory"
    )


def check(arrays: Arrays, manifest: Manifest) -> None:
    """Raise DataError unless ``arrays`` fit the bundle: names, shapes, dtypes, finite numbers, labels in range."""
    features = (*manifest.inputs, *manifest.targets)
    for feature in features:
        array = arrays.get(feature.name)
        if array is None:
            raise DataError(
                f"array {feature.name!r} is missing: found {', '.join(sorted(arrays)) or 'none'}, "
                f"expected {', '.join(f.name for f in features)}"
            )
        if array.shape[1:] != feature.shape or not array.ndim or not _convertible(array.dtype, feature):
            raise DataError(_misfit(array, feature))
        if array.dtype.kind == "f":
            for start in range(0, len(array), step := max(1, _BLOCK // max(1, array[:1].size))):
                good = np.isfinite(array[start : start + step])
                if not good.all():
                    row = start + int(np.argwhere(~good)[0][0])
                    raise DataError(
                        f"{feature.name!r} holds NaN or infinity, first in row {row}; drop or fill such rows"
                    )
    ArraySource({feature.name: arrays[feature.name] for feature in features})
    _check_labels(arrays, manifest)


def fill(out: Array, array: object, feature: Feature) -> None:
    """Copy one feature of a batch into ``out`` (``[rows, *shape]`` of the feature's dtype), converted.

    Raises:
        DataError: it is missing, or of a shape or dtype that does not fit.
    """
    if not isinstance(array, np.ndarray) or array.shape != out.shape:
        raise DataError(_misfit(array, feature, rows=len(out)))
    if array.dtype == out.dtype:
        np.copyto(out, array)
    elif not _convertible(array.dtype, feature):
        raise DataError(_misfit(array, feature, rows=len(out)))
    elif feature.dtype == "float32" and array.dtype.kind in "biu":
        np.multiply(array, np.float32(feature.scale), out=out, casting="unsafe")
    else:
        np.copyto(out, array, casting="unsafe")


def _convertible(dtype: np.dtype[np.generic], feature: Feature) -> bool:
    """Whether values of ``dtype`` can stand for the feature: any number for float32, any integer for int64."""
    return dtype.kind in ("biuf" if feature.dtype == "float32" else "biu")


def _misfit(array: object, feature: Feature, rows: int | str = "n") -> str:
    wanted: list[int | str] = [rows, *feature.shape]
    kind = "float32 or integers" if feature.dtype == "float32" else "int64 or other integers"
    if isinstance(array, np.ndarray):
        found = f"{array.dtype} {_brackets(array.shape)}"
    else:
        found = "missing" if array is None else f"a {type(array).__name__} and no numpy array"
    return f"{feature.name!r} is {found}; expected {kind} {_brackets(wanted)}, a row for each sample"


def _brackets(shape: Iterable[int | str]) -> str:
    return "[" + ", ".join(str(side) for side in shape) + "]"


def _check_labels(arrays: Arrays, manifest: Manifest) -> None:
    """Class labels beyond the model's outputs would train nothing, silently."""
    if manifest.loss != "cross_entropy" or len(manifest.targets) != 1 or len(manifest.outputs) != 1:
        return
    target, scores = manifest.targets[0], manifest.outputs[0].shape
    if target.dtype != "int64" or len(scores) != len(target.shape) + 1:
        return
    classes = scores[-1] if scores[:-1] == target.shape else scores[0]
    low, high = arrays[target.name].min(), arrays[target.name].max()
    if low < 0 or high >= classes:
        raise DataError(f"labels {target.name!r} run from {low} to {high}; the model has classes 0 to {classes - 1}")


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file, by name.

    Raises:
        DataError: it cannot be read, or holds more than plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); name an .npz file") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is not an .npz file of plain arrays; write it with numpy.savez") from error


def _folder(path: Path, manifest: Manifest) -> dict[str, Array]:
    files = sorted(path.glob("*.csv"))
    if not files:
        raise DataError(f"{path}: no .csv file in this folder; expected at least one")
    header, tables = read_table(files[0])
    parts = [tables]
    for file in files[1:]:
        names, table = read_table(file)
        if names != header:
            raise DataError(
                f"{file}: columns {', '.join(names)}; expected those of {files[0].name}: {', '.join(header)}"
            )
        parts.append(table)
    return table_arrays(path, header, np.concatenate(parts), manifest)


def table_arrays(path: Path, header: list[str], table: npt.NDArray[np.float64], manifest: Manifest) -> dict[str, Array]:
    """The arrays of a table of numbers (``[rows, columns] float64``), by the names of its columns; see `open_data`.

    Raises:
        DataError: the columns do not fit the bundle; ``path`` is what the message names.
    """
    if len(manifest.inputs) != 1:
        raise DataError(f"{path}: CSV makes one input, the bundle has {len(manifest.inputs)}; use .npz or a function")
    arrays: dict[str, Array] = {}
    used: set[int] = set()
    for target in manifest.targets:
        wanted = (
            [target.name] if not target.shape else [f"{target.name}.{i}" for i in range(int(np.prod(target.shape)))]
        )
        missing = [name for name in wanted if name not in header]
        if missing:
            raise DataError(f"{path}: target column {missing[0]!r} is missing; found {', '.join(header)}")
        columns = [header.index(name) for name in wanted]
        used.update(columns)
        values = table[:, columns].reshape(-1, *target.shape)
        if target.dtype == "int64" and not (np.isfinite(values) & (values == np.rint(values))).all():
            raise DataError(f"{path}: column {target.name!r} holds fractions or NaN; expected whole numbers")
        arrays[target.name] = values.astype(target.dtype)
    rest = [column for column in range(len(header)) if column not in used]
    feature = manifest.inputs[0]
    if len(rest) != int(np.prod(feature.shape)):
        raise DataError(
            f"{path}: {len(rest)} input columns; input {feature.name!r} has shape {_brackets(feature.shape)}, "
            f"that is {int(np.prod(feature.shape))} columns"
        )
    arrays[feature.name] = table[:, rest].reshape(-1, *feature.shape).astype(feature.dtype)
    return arrays


def read_table(file: Path) -> tuple[list[str], npt.NDArray[np.float64]]:
    """A CSV file's header and its numbers, ``[rows, columns] float64``.

    Raises:
        DataError: it cannot be read, or is no table of numbers.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header = [name.strip() for name in next(csv.reader(lines), [])]
            rows = [line for line in lines if line.strip()]
        if not header:
            raise DataError(f"{file}: empty; expected a header row and a row for each sample")
        if not rows:
            return header, np.empty((0, len(header)))
        table = np.loadtxt(rows, delimiter=",", ndmin=2, quotechar='"', comments=None)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: not a table of numbers ({error}); expected a header row and numbers below") from error
    if table.shape[1] != len(header):
        raise DataError(f"{file}: rows of {table.shape[1]} numbers below a header of {len(header)} names")
    return header, table


def _call(spec: str) -> Arrays | DataSource:
    name, _, attribute = spec.partition(":")
    # A console script does not search the working directory, where a user's module lies.
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], object] = getattr(importlib.import_module(name), attribute)
        found = function()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data {spec!r}: {type(error).__name__}: {error}; expected module:function to run") from error
    finally:
        sys.path.remove(os.getcwd())
    if isinstance(found, Mapping):
        return {str(key): np.asarray(value) for key, value in found.items()}
    if isinstance(found, DataSource):
        return found
    raise DataError(
        f"data {spec!r} returned {type(found).__name__}; "
        "expected a mapping of arrays, or an object with samples and batches"
    )
