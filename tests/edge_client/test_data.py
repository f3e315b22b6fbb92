"""Data sources: every sample once, seeds decide the order, a misfit is named with both shapes and dtypes."""

import msgspec
import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.data import ArraySource, DataSource, check, fill, open_data, split
from edge_client.errors import DataError
from edge_client.manifest import Feature
from tests.toy import toy_bundle, toy_data

MANIFEST = Bundle.from_bytes(toy_bundle()).manifest
NUMBERS = {"x": np.arange(40, dtype=np.float32).reshape(10, 4), "y": np.arange(10) % 3}


def gathered(source, size=3, seed=None):
    batches = list(source.batches(size, seed=seed))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("size", [1, 3, 10, 64])
@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("rows", [None, np.array([8, 1, 5, 2, 2])])
def test_each_sample_once_and_its_parts_together(size, seed, rows):
    source = ArraySource(NUMBERS, rows)
    batches = list(source.batches(size, seed=seed))
    assert [len(batch["y"]) for batch in batches[:-1]] == [min(size, source.samples)] * (len(batches) - 1)
    assert sum(len(batch["y"]) for batch in batches) == source.samples
    found = gathered(source, size, seed)
    numbers = (found["x"][:, 0] / 4).astype(int)
    np.testing.assert_array_equal(found["y"], numbers % 3)
    expected = np.arange(10) if rows is None else rows
    np.testing.assert_array_equal(np.sort(numbers), np.sort(expected))
    if seed is None:
        np.testing.assert_array_equal(numbers, expected)


def test_seeds_decide_the_order():
    source = ArraySource(toy_data(50))
    one, same, other = (gathered(source, 8, seed)["x"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_integers_stay_as_they_are():
    pixels = np.zeros((5, 4), np.uint8)
    source = ArraySource({"x": pixels, "y": np.zeros(5, np.uint8)})
    assert source.arrays["x"] is pixels
    assert next(source.batches(2, seed=1))["x"].dtype == np.uint8


def test_subsets_share_memory_and_nest():
    source = ArraySource(NUMBERS).subset(np.array([9, 4, 7])).subset(np.array([2, 0]))
    assert source.samples == 2
    assert source.arrays["x"] is NUMBERS["x"]
    np.testing.assert_array_equal(gathered(source)["x"][:, 0], [28, 36])


@pytest.mark.parametrize("rows", [[3], [-1], [0, 10]])
def test_subset_out_of_range(rows):
    with pytest.raises(DataError, match="there are 3"):
        ArraySource(NUMBERS).subset(np.array([1, 2, 3])).subset(np.array(rows))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "no arrays"),
        ({"x": np.zeros((0, 4)), "y": np.zeros(0)}, "no samples in x, y"),
        ({"x": np.zeros((3, 4)), "y": np.zeros(4)}, "found x 3, y 4"),
    ],
)
def test_arrays_that_are_no_source(arrays, says):
    with pytest.raises(DataError, match=says):
        ArraySource(arrays)


def test_split_is_a_partition_by_seed():
    source = ArraySource(NUMBERS).subset(np.arange(1, 10))
    train, held = split(source, 0.3, seed=1)
    assert (train.samples, held.samples) == (6, 3)
    together = np.concatenate([train.rows, held.rows])
    np.testing.assert_array_equal(np.sort(together), np.arange(1, 10))
    np.testing.assert_array_equal(split(source, 0.3, seed=1)[1].rows, held.rows)
    assert any(not np.array_equal(split(source, 0.3, seed)[1].rows, held.rows) for seed in (2, 3))
    assert split(source, 0.001, seed=1)[1].samples == 1


@pytest.mark.parametrize(
    ("fraction", "says"), [(0, "fraction of 0;"), (1, "fraction of 1;"), (0.99, "none to train on")]
)
def test_split_refuses(fraction, says):
    with pytest.raises(DataError, match=says):
        split(ArraySource(NUMBERS), fraction, seed=0)


def numbered(count):
    return ArraySource({"x": np.arange(count, dtype=np.float32)[:, None], "y": np.zeros(count, np.int64)})


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("count", [60, 97, 1000, 100_003])
def test_what_is_kept_aside_and_what_is_left_are_all_samples_once(count, share):
    left, aside = numbered(count).apart(share)
    assert (left.samples, aside.samples) == (count - int(count * share + 1e-9), int(count * share + 1e-9))
    together = np.concatenate([left.rows, aside.rows])
    np.testing.assert_array_equal(np.sort(together), np.arange(count))


def test_the_same_samples_are_kept_aside_every_time_whatever_is_added():
    before, after = numbered(100).apart(0.2)[1].rows, numbered(163).apart(0.2)[1].rows
    np.testing.assert_array_equal(before, numbered(100).apart(0.2)[1].rows)
    np.testing.assert_array_equal(before, after[after < 100])


def test_samples_in_order_are_kept_aside_evenly_and_without_a_pattern():
    rows = numbered(1000).apart(0.2)[1].rows
    np.testing.assert_array_equal(rows // 5, np.arange(200))
    # Were it every fifth one, data that goes through five classes would keep one of them aside.
    assert (np.bincount(rows % 5) > 20).all()


def test_a_part_keeps_aside_some_of_its_own():
    part = numbered(100).subset(np.arange(50, 100))
    left, aside = part.apart(0.1)
    assert (left.samples, aside.samples) == (45, 5)
    assert aside.rows.min() >= 50


@pytest.mark.parametrize(("count", "share"), [(1, 0.2), (1, 0.99), (4, 0.2), (9, 0.1)])
def test_too_few_samples_keep_none_aside(count, share):
    source = numbered(count)
    assert source.apart(share) == (source, None)


@pytest.mark.parametrize(("count", "share", "kept"), [(2, 0.5, 1), (3, 1 / 3, 1), (5, 0.2, 1), (10, 0.99, 9)])
def test_at_least_one_sample_is_left(count, share, kept):
    left, aside = numbered(count).apart(share)
    assert (left.samples, aside.samples) == (count - kept, kept)


def altered(**changes):
    return {**toy_data(10), **changes}


def poisoned(value):
    x = toy_data(10)["x"]
    x[6, 2] = value
    return altered(x=x)


MISFITS = {
    "missing": ({"x": np.zeros((3, 4), np.float32)}, "array 'y' is missing: found x, expected x, y"),
    "shape": (altered(x=np.zeros((10, 5), np.float32)), r"'x' is float32 \[10, 5\]; expected float32 .*\[n, 4\]"),
    "rank": (altered(y=np.zeros((10, 1), int)), r"'y' is int64 \[10, 1\]; expected int64 .*\[n\]"),
    "scalar": (altered(y=np.array(3)), r"'y' is int64 \[\]; expected int64 .*\[n\]"),
    "float labels": (altered(y=np.zeros(10)), r"'y' is float64 \[10\]; expected int64 or other integers \[n\]"),
    "text": (altered(x=np.full((10, 4), "a")), r"'x' is <U1 \[10, 4\]; expected float32"),
    "lengths": (altered(y=np.zeros(9, int)), "found x 10, y 9"),
    "empty": (altered(x=np.zeros((0, 4), np.float32), y=np.zeros(0, int)), "no samples"),
    "NaN": (poisoned(np.nan), "'x' holds NaN or infinity, first in row 6; drop or fill"),
    "infinity": (poisoned(-np.inf), "'x' holds NaN or infinity, first in row 6"),
    "label beyond": (altered(y=np.full(10, 3)), "'y' run from 3 to 3; the model has classes 0 to 2"),
    "label below": (altered(y=np.arange(10) % 3 - 1), "'y' run from -1 to 1"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_check_names_what_does_not_fit(case):
    arrays, says = MISFITS[case]
    with pytest.raises(DataError, match=says):
        check(arrays, MANIFEST)


@pytest.mark.parametrize(
    "arrays",
    [
        altered(),
        altered(extra=np.zeros(3)),
        altered(x=np.zeros((10, 4)), y=np.zeros(10, np.uint8)),
        altered(x=np.zeros((10, 4), np.uint8)),
        altered(x=np.zeros((10, 4), bool)),
    ],
)
def test_check_takes_what_can_be_converted(arrays):
    check(arrays, MANIFEST)


def test_labels_are_compared_with_the_axis_of_the_classes():
    manifest = msgspec.structs.replace(
        MANIFEST, targets=(Feature("y", (6,), "int64"),), outputs=(Feature("scores", (6, 9), "float32"),)
    )
    check(altered(y=np.full((10, 6), 8)), manifest)
    with pytest.raises(DataError, match="classes 0 to 8"):
        check(altered(y=np.full((10, 6), 9)), manifest)
    check(altered(y=np.full(10, 99)), msgspec.structs.replace(MANIFEST, loss="custom"))


def test_fill_converts():
    x = Feature("x", (2,), "float32", scale=0.5)
    out = np.empty((2, 2), np.float32)
    for array in (np.array([[1, 2], [3, 255]], kind) for kind in (np.uint8, np.int64, np.uint16)):
        fill(out, array, x)
        np.testing.assert_array_equal(out, [[0.5, 1], [1.5, 127.5]])
    fill(out, np.array([[1, 2], [3, 4]], np.float64), x)
    np.testing.assert_array_equal(out, [[1, 2], [3, 4]])


def test_npz(tmp_path):
    data = toy_data(20)
    np.savez(tmp_path / "readings.npz", **data, writer=np.zeros(20))
    source = open_data(str(tmp_path / "readings.npz"), MANIFEST)
    assert isinstance(source, DataSource)
    assert source.samples == 20
    np.testing.assert_array_equal(gathered(source)["x"], data["x"])
    assert set(next(source.batches(1, seed=None))) == {"x", "y"}


def test_npz_that_cannot_be_read(tmp_path):
    path = tmp_path / "readings.npz"
    with pytest.raises(DataError, match=r"readings\.npz: cannot be read"):
        open_data(str(path), MANIFEST)
    np.savez(path, **toy_data(20))
    whole = path.read_bytes()
    for junk in (b"", b"junk", whole[:300]):
        path.write_bytes(junk)
        with pytest.raises(
            DataError, match=r"readings\.npz: is not an \.npz file of plain arrays; write it with numpy\.savez"
        ):
            open_data(str(path), MANIFEST)
    np.savez(path, x=np.array([{}], object), y=np.zeros(1), allow_pickle=True)
    with pytest.raises(DataError, match=r"is not an \.npz file of plain arrays"):
        open_data(str(path), MANIFEST)
    np.savez(path, x=np.zeros((3, 2), np.float32), y=np.zeros(3, int))
    with pytest.raises(DataError, match=r"readings\.npz': 'x' is float32 \[3, 2\]; expected float32 .*\[n, 4\]"):
        open_data(str(path), MANIFEST)


def folder(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return str(tmp_path)


HEADER = "a,b,y,c,d\n"


def test_csv_folder(tmp_path):
    spec = folder(
        tmp_path,
        two=HEADER + "9,8,0,7,6\n",
        one='\ufeff"a", b,y,c,d\r\n1,2.5,2,3,-4e1\r\n\r\n5,6,1,"7",8\r\n',
        zero=HEADER,
    )
    found = gathered(open_data(spec, MANIFEST))
    np.testing.assert_array_equal(found["x"], [[1, 2.5, 3, -40], [5, 6, 7, 8], [9, 8, 7, 6]])
    np.testing.assert_array_equal(found["y"], [2, 1, 0])
    assert (found["x"].dtype, found["y"].dtype) == (np.float32, np.int64)


def test_csv_with_several_target_columns_and_a_shaped_input(tmp_path):
    manifest = msgspec.structs.replace(
        MANIFEST,
        loss="mse",
        inputs=(Feature("x", (1, 2), "float32"),),
        targets=(Feature("y", (2,), "float32"),),
    )
    found = gathered(open_data(folder(tmp_path, one="y.1,a,y.0,b\n1,2,3.5,4\n"), manifest))
    np.testing.assert_array_equal(found["x"], [[[2, 4]]])
    np.testing.assert_array_equal(found["y"], [[3.5, 1]])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"no \.csv file"),
        ({"one": ""}, r"one\.csv: empty"),
        ({"one": HEADER}, "no samples"),
        ({"one": HEADER + "1,2,0,3\n"}, "rows of 4 numbers below a header of 5"),
        ({"one": HEADER + "1,2,0,3,4\n1,2\n"}, r"one\.csv: not a table of numbers .*columns"),
        ({"one": HEADER + "1,2,0,3,warm\n"}, r"one\.csv: not a table of numbers .*warm"),
        ({"one": HEADER + "1,2,0,3,\n"}, r"one\.csv: not a table of numbers"),
        ({"one": HEADER + "1,2,0.5,3,4\n"}, "column 'y' holds fractions"),
        ({"one": HEADER + "1,2,nan,3,4\n"}, "column 'y' holds fractions"),
        ({"one": HEADER + "1,2,0,3,nan\n"}, "'x' holds NaN or infinity, first in row 0"),
        ({"one": HEADER + "1,2,7,3,4\n"}, "'y' run from 7 to 7"),
        ({"one": "a,b,c,d\n1,2,3,4\n"}, "target column 'y' is missing; found a, b, c, d"),
        ({"one": "a,b,y\n1,2,0\n"}, r"2 input columns; input 'x' has shape \[4\]"),
        ({"one": HEADER + "1,2,0,3,4\n", "two": "b,a,y,c,d\n1,2,0,3,4\n"}, r"two\.csv: columns b, a.*one\.csv: a, b"),
    ],
)
def test_csv_that_does_not_fit(tmp_path, files, says):
    with pytest.raises(DataError, match=says) as caught:
        open_data(folder(tmp_path, **files), MANIFEST)
    assert "\n" not in str(caught.value)


MODULE = """
from tests.toy import toy_data
from edge_client.data import ArraySource
from edge_client.errors import DataError

def arrays():
    return toy_data(12)

def lists():
    return {name: array.tolist() for name, array in toy_data(12).items()}

def source():
    return ArraySource(toy_data(12))

def broken():
    return 1 / 0

def sensor():
    raise DataError("sensor 3 is off; switch it on")

def number():
    return 7

def narrow():
    return {"x": [[1.0]], "y": [0]}
"""


@pytest.mark.parametrize("name", ["arrays", "lists", "source"])
def test_callable(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"my_data_{name}.py").write_text(MODULE)
    source = open_data(f"my_data_{name}:{name}", MANIFEST)
    np.testing.assert_array_equal(gathered(source)["x"], toy_data(12)["x"])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("my_bad_data:broken", "'my_bad_data:broken': ZeroDivisionError: division by zero"),
        ("my_bad_data:absent", "has no attribute 'absent'"),
        ("my_bad_data:", "my_bad_data"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        (":f", "':f'"),
        ("my_bad_data:sensor", "^sensor 3 is off; switch it on$"),
        ("my_bad_data:number", "returned int; expected a mapping of arrays"),
        ("my_bad_data:narrow", r"narrow': 'x' is float64 \[1, 1\]; expected float32 .*\[n, 4\]"),
        ("absent.csv", r"'absent\.csv' is neither"),
        ("absent/folder", "'absent/folder' is neither"),
    ],
)
def test_callable_that_fails(tmp_path, monkeypatch, spec, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_bad_data.py").write_text(MODULE)
    with pytest.raises(DataError, match=says):
        open_data(spec, MANIFEST)
