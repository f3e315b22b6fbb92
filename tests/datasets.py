"""Real data sets for tests and benchmarks, as arrays and as the ``.npz`` files that a federation reads.

    python tests/datasets.py fashion-mnist|mnist|mnist-writers|shakespeare|shakespeare-64 build/data

The files lie beside the repository in ``../shared/data``, or where the environment variable ``FEDGE_DATA`` says.
"""

import gzip
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

LEAST_CHARACTERS = 1000  # of a speaker, to be a client: 141 of 309
SEQUENCE = 40


class DataMissingError(Exception):
    """The data sets are not on this machine."""


@dataclass(frozen=True)
class DataSet:
    """Training and test arrays under the names of a bundle's features: ``x``, ``y`` and, where known, ``user``."""

    train: dict[str, npt.NDArray[np.generic]]
    test: dict[str, npt.NDArray[np.generic]]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``train.npz`` and ``test.npz``, each whole or not at all; files that exist are taken as they are."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "train.npz", folder / "test.npz"
        for path, arrays in zip(paths, (self.train, self.test), strict=True):
            if not path.exists():
                partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
                np.savez(partial, **arrays)
                partial.replace(path)
        return paths


def folder(name: str) -> Path:
    """Where a data set lies.

    Raises:
        DataMissingError: it is not there.
    """
    root = Path(os.environ.get("FEDGE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (root / name).is_dir():
        raise DataMissingError(f"no {name} in {root}: set FEDGE_DATA to the folder that holds the data sets")
    return root / name


def require(name: str) -> Path:
    """Where a data set lies, for a test: it is skipped with the reason when the data is not there."""
    import pytest

    try:
        return folder(name)
    except DataMissingError as absent:
        pytest.skip(str(absent))


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (the format of MNIST) as an array of its shape."""
    data = gzip.decompress(path.read_bytes())
    kind, dimensions = data[2], data[3]
    if data[:2] != b"\0\0" or kind != 0x08:
        raise ValueError(f"{path} is no IDX file of unsigned bytes")
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def images(name: str) -> DataSet:
    """Fashion-MNIST or MNIST: ``x [n, 1, 28, 28] uint8``, ``y [n] int64``; 60,000 and 10,000."""
    where = folder(name)

    def part(prefix: str) -> dict[str, npt.NDArray[np.generic]]:
        pixels = read_idx(where / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(where / f"{prefix}-labels-idx1-ubyte.gz")
        return {"x": pixels[:, None], "y": labels.astype(np.int64)}

    return DataSet(part("train"), part("t10k"))


def mnist_writers() -> DataSet:
    """MNIST with the writer of each image as ``user [n] int64``: 539 writers in training, others in the test set."""
    digits = images("mnist")
    with np.load(folder("mnist-writers") / "mnist_writers.npz") as writers:
        return DataSet(
            digits.train | {"user": writers["train_writer"].astype(np.int64)},
            digits.test | {"user": writers["test_writer"].astype(np.int64)},
        )


def shakespeare(sequence: int = SEQUENCE) -> DataSet:
    """Tiny Shakespeare by speaker: ``x``, ``y`` ``[n, sequence] int64``, ``y`` a character on; ``user [n] int64``.

    A character is its place in the sorted alphabet of 65. Clients are the 141 speakers of at least 1,000
    characters; the first 80 % of what each says trains, the rest tests. Windows do not overlap; a last part too
    short for one is left out.
    """
    with gzip.open(folder("tinyshakespeare") / "by_speaker.json.gz", "rt", encoding="utf-8") as file:
        speeches: dict[str, list[str]] = json.load(file)
    texts = {speaker: "\n".join(said) for speaker, said in sorted(speeches.items())}
    alphabet = {letter: code for code, letter in enumerate(sorted(set("".join(texts.values()))))}
    speakers = [text for text in texts.values() if len(text) >= LEAST_CHARACTERS]
    parts: tuple[list[npt.NDArray[np.int64]], ...] = ([], [])
    users: tuple[list[npt.NDArray[np.int64]], ...] = ([], [])
    for user, text in enumerate(speakers):
        codes = np.array([alphabet[letter] for letter in text], np.int64)
        for part, owners, said in zip(parts, users, np.split(codes, [len(codes) * 4 // 5]), strict=True):
            windows = (len(said) - 1) // sequence
            part.append(np.lib.stride_tricks.sliding_window_view(said, sequence + 1)[: windows * sequence : sequence])
            owners.append(np.full(windows, user, np.int64))

    def joined(
        part: list[npt.NDArray[np.int64]], owners: list[npt.NDArray[np.int64]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        windows = np.concatenate(part)
        return {
            "x": np.ascontiguousarray(windows[:, :-1]),
            "y": np.ascontiguousarray(windows[:, 1:]),
            "user": np.concatenate(owners),
        }

    return DataSet(joined(parts[0], users[0]), joined(parts[1], users[1]))


LOADERS = {
    "fashion-mnist": lambda: images("fashion-mnist"),
    "mnist": lambda: images("mnist"),
    "mnist-writers": mnist_writers,
    "shakespeare": shakespeare,
    "shakespeare-64": lambda: shakespeare(64),
}


def main() -> int:
    """Write one data set as ``.npz`` files and say where."""
    if len(sys.argv) != 3 or sys.argv[1] not in LOADERS:
        print(f"usage: python tests/datasets.py {'|'.join(LOADERS)} FOLDER", file=sys.stderr)
        return 2
    try:
        paths = LOADERS[sys.argv[1]]().write(Path(sys.argv[2]))
    except DataMissingError as absent:
        print(absent, file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
