"""Counts of many clients: exact, in any order, bounded by what each says it has, and kept over a restart."""

import csv
import json
import random

import msgspec
import numpy as np
import pytest

from broker_server import events as e
from broker_server.analytics import report_plan
from broker_server.config import Federation
from broker_server.findings import Collection, Findings, drift
from broker_server.ledger import Ledger
from broker_server.records import Round, Task
from broker_server.worker import Worker
from edge_client.bundle import Bundle
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.errors import CodecError, ConfigError
from edge_client.reporting import LIMB, UNIT, report_layouts
from tests.toy import toy_bundle

DATA = toy_bundle()
BUNDLE = Bundle.from_bytes(DATA)


def settings(folder="state", **sections) -> Federation:
    base = {
        "federation": {"name": "toys", "bundle": "b", "state": str(folder)},
        "codec": {"kind": "none"},
        "evaluation": {"clients": 3, "confusion": True},
        "analytics": {"labels": True, "features": 2, "range": [-1.0, 1.0], "least": 2},
    }
    return msgspec.convert(base | sections, Federation)


LAYOUTS = report_layouts(BUNDLE.manifest, report_plan(settings()))


def encoded(samples=10.0, held=100.0, scalars=None, **vectors) -> bytes:
    flat = {name: np.asarray(rows, np.float32).ravel() for name, rows in vectors.items()}
    told = {"samples": samples, "sum.count": samples, "sum.correct": 1.0, "sum.loss": 2.0}
    told |= {"samples.held": held} if flat.keys() - {"confusion"} else {}
    layouts = {name: LAYOUTS[name] for name in flat}
    return encode_update(flat, layouts, told | (scalars or {}), CodecSettings()).data


def columns(*rows) -> np.ndarray:
    """``features`` of all four columns, the others empty."""
    table = np.zeros((4, 8))
    for number, row in enumerate(rows):
        table[number] = row
    return table


FIRST = [[3, 1, 0], [0, 2, 0], [0, 4, 0]]
SECOND = [[0, 0, 1], [0, 5, 0], [1, 0, 3]]
HALF = UNIT // 2


def test_what_clients_count_adds_up_by_hand():
    collection = Collection(settings(), BUNDLE.manifest)
    # Below 1, one value of -0.5 (z = 1/4), two of 0.5 (z = 3/4), above 0; then one value of 0.5 alone.
    one = columns([1, 1, 2, 0, 0, UNIT * 7 // 4, 0, UNIT * 19 // 16])
    other = columns([0, 0, 1, 5, 0, UNIT * 3 // 4, 0, UNIT * 9 // 16])
    for data in (
        encoded(confusion=FIRST, labels=[5, 0, 95], features=one),
        encoded(confusion=SECOND, labels=[0, 1, 2], features=other),
        encoded(),
    ):
        collection.add(collection.read(data)[2])
    found = collection.finish(7, 3)
    assert (found.round, found.version, found.clients) == (7, 3, {"confusion": 2, "labels": 2, "features": 2})
    assert found.confusion == ((3, 1, 1), (0, 7, 0), (1, 4, 3))
    assert found.labels == (5, 1, 97)
    assert [(row.name, row.samples, row.recall, row.precision) for row in found.by_class] == [
        ("0", 5, 3 / 5, 3 / 4),
        ("1", 7, 1.0, 7 / 12),
        ("2", 8, 3 / 8, 3 / 4),
    ]
    first = found.features[0]
    assert (first.name, first.below, first.bins, first.above) == ("x[0]", 1, (1, 3), 5)
    assert first.mean == pytest.approx((-0.5 + 3 * 0.5) / 4)
    assert first.deviation == pytest.approx(np.std([-0.5, 0.5, 0.5, 0.5]))
    assert (found.features[1].mean, found.features[1].deviation) == (None, None)
    assert collection.finish(8, 3) is None


def test_the_order_changes_no_bit_and_large_counts_stay_exact():
    dice = np.random.default_rng(1)
    updates = []
    for _ in range(40):
        confusion = dice.integers(0, 2**20, (3, 3)).astype(np.float32)
        bins = dice.integers(0, 2**22, (4, 4))
        units = bins[:, 1:3].sum(1) * UNIT // 3
        features = np.column_stack([bins, units // LIMB, units % LIMB, units // 2 // LIMB, units // 2 % LIMB])
        data = encoded(2.0**24, 2.0**25, confusion=confusion, labels=confusion[0], features=features)
        updates.append((data, confusion.astype(object)))
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(updates)
        collection = Collection(settings(), BUNDLE.manifest)
        for data, _ in updates:
            collection.add(collection.read(data)[2])
        found.append(msgspec.json.encode(collection.finish(1, 1)))
    assert found[0] == found[1] == found[2]
    total = sum(confusion.astype(int) for _, confusion in updates)
    assert json.loads(found[0])["confusion"] == total.tolist()


def test_sums_over_few_clients_are_not_kept():
    collection = Collection(settings(), BUNDLE.manifest)
    collection.add(collection.read(encoded(confusion=FIRST, labels=[1, 2, 3]))[2])
    collection.add(collection.read(encoded(labels=[1, 2, 3]))[2])
    found = collection.finish(1, 1)
    assert (found.confusion, found.by_class, found.labels, found.features) == ((), [], (2, 4, 6), ())
    assert (found.clients, found.least) == ({"confusion": 1, "labels": 2}, 2)


def outside(place: int, value: float) -> np.ndarray:
    row = [1.0, 1.0, 2.0, 0.0, 0.0, 100.0, 0.0, 50.0]
    row[place] = value
    return columns(row)


LIES = {
    "not a number": ({"confusion": [[np.nan] * 3] * 3}, "no counts"),
    "infinite": ({"labels": [np.inf, 0, 0]}, "no counts"),
    "negative": ({"confusion": [[-1, 0, 0], [0] * 3, [0] * 3]}, "no counts"),
    "a fraction": ({"labels": [0.5, 0, 0]}, "no counts"),
    "more than its samples": ({"confusion": [[11, 0, 0], [0] * 3, [0] * 3]}, "counts 11 in 'confusion'; .*at most 10"),
    "more labels than samples": ({"labels": [50, 51, 0]}, "counts 101 in 'labels'"),
    "more values than samples": ({"features": outside(0, 98)}, "counts 101 in 'features of x'"),
    "a sum beyond its values": ({"features": outside(4, 1)}, "sums of 'x' beyond"),
    "a part beyond its part": ({"features": outside(5, LIMB)}, "sums of 'x' beyond"),
    "squares beyond their values": ({"features": outside(6, 1)}, "sums of 'x' beyond"),
    "no number of samples": ({"labels": [1, 0, 0], "held": 0.0}, "counts 0 samples"),
    "samples without end": ({"labels": [1, 0, 0], "held": 2.0**29}, "samples; expected 1 to"),
    "a negative count": ({"scalars": {"sum.count": -1.0}}, "sum.count is -1"),
    "a count without end": ({"scalars": {"sum.count": 1e300}}, "sum.count is 1e\\+300 with"),
    "more right than counted": ({"scalars": {"sum.correct": 11.0}}, "sum.correct is 11 with a count of 10"),
    "a loss without end": ({"scalars": {"sum.loss": 1e200}}, "sum.loss is 1e\\+200"),
    "a lie about its own model": (
        {"scalars": {"personal.sum.count": 5.0, "personal.sum.correct": 6.0}},
        "personal.sum.correct is 6 with a count of 5",
    ),
}


@pytest.mark.parametrize(("said", "words"), LIES.values(), ids=LIES.keys())
def test_a_lie_that_can_be_seen_is_refused(said, words):
    with pytest.raises(CodecError, match=words):
        Collection(settings(), BUNDLE.manifest).read(encoded(**said))


def test_counts_whose_sum_is_too_large_for_whole_numbers_are_refused():
    bundle = Bundle.from_bytes(toy_bundle(classes=40))
    asked = settings(analytics={"least": 1})
    layouts = report_layouts(bundle.manifest, report_plan(asked))
    # 1600 of nearly 2^53 are more than 2^63, where int64 begins again below 0.
    told = {"samples": 10.0, "sum.count": 10.0, "sum.correct": 1.0, "sum.loss": 2.0}
    counts = np.full(40 * 40, np.nextafter(np.float32(2**53), np.float32(0)), np.float32)
    data = encode_update({"confusion": counts}, layouts, told, CodecSettings()).data
    with pytest.raises(CodecError, match="in 'confusion'; expected at most 10"):
        Collection(asked, bundle.manifest).read(data)


def test_what_was_not_asked_for_is_refused_and_made_up_sums_are_left_out():
    few = Collection(settings(analytics={}, evaluation={}), BUNDLE.manifest)
    with pytest.raises(CodecError, match=r"update has the vectors \['labels'\]; expected \[\]"):
        few.read(encoded(labels=[1, 2, 3]))
    made_up = {
        "sum.beauty": 1.0,
        "other.sum.count": 3.0,
        "personal.sum.loss": 0.0,
        "personal.sum.count": 4.0,
        "note": 5,
    }
    _, scalars, _ = few.read(encoded(scalars=made_up))
    assert scalars.keys() - {"samples", "sum.count", "sum.correct", "sum.loss"} == {
        "personal.sum.loss",
        "personal.sum.count",
        "note",
    }


def test_a_client_counts_as_no_more_samples_than_the_limit():
    collection = Collection(
        settings(limits={"samples": 50}, analytics={"least": 1, "labels": True, "features": 2}), BUNDLE.manifest
    )
    row = [0, 40, 60, 0, 0, 64 * UNIT, 0, 48 * UNIT]
    row[4:] = [row[5] // LIMB, row[5] % LIMB, row[7] // LIMB, row[7] % LIMB]
    data = encoded(
        100.0,
        100.0,
        {"sum.correct": 80.0},
        confusion=[[81, 0, 0], [0] * 3, [0] * 3],
        labels=[99, 0, 1],
        features=columns(row),
    )
    samples, scalars, counts = collection.read(data)
    assert (samples, scalars["sum.correct"], scalars["sum.count"], scalars["samples"]) == (50, 40.0, 50.0, 100.0)
    collection.add(counts)
    found = collection.finish(1, 1)
    assert found.confusion[0] == (40, 0, 0)
    assert found.labels == (49, 0, 0)
    assert found.features[0].bins == (20, 30)
    assert found.features[0].mean == pytest.approx(0.64, abs=1e-5)


def task(number: int, clients=("a", "b")) -> Task:
    return Task(epoch=1, task=number, round=1, kind="evaluate", version=0, cohort=clients, plan=b"", opened=5.0)


def finish(number: int = 1) -> e.FinishRound:
    done = Round(round=number, version=number, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0)
    return e.FinishRound(done, False, 2)


def test_a_server_that_ends_in_between_finds_the_same(tmp_path):
    found = []
    for restart in (False, True):
        folder = tmp_path / str(restart)
        worker = Worker(settings(folder), DATA)
        worker.start()
        worker.perform(e.OpenTask(task(1)))
        worker.perform(e.Record(1, 1, "a", encoded(confusion=FIRST, labels=[1, 0, 4])))
        if restart:
            worker.close()
            worker = Worker(settings(folder), DATA)
            assert [event.client for event in worker.replay(worker.start())] == ["a"]
        answer = worker.perform(e.Record(1, 1, "b", encoded(confusion=SECOND)))
        assert isinstance(answer, e.Recorded)
        again = worker.perform(e.Record(1, 1, "b", encoded(confusion=SECOND)))
        assert again == answer, "and counts once"
        worker.perform(e.CloseTask(1, 1, "done"))
        worker.perform(finish())
        worker.close()
        with Ledger.read(folder / "ledger.db") as ledger:
            found.append([msgspec.json.decode(data, type=Findings) for data in ledger.findings()])
        written = json.loads((folder / "analytics" / "newest.json").read_text())
        assert written["by_class"][1] == {"name": "1", "samples": 7, "recall": 1.0, "precision": 7 / 12}
        with (folder / "analytics" / "confusion.csv").open() as lines:
            assert list(csv.reader(lines)) == [
                ["class", "0", "1", "2"],
                ["0", "3", "1", "1"],
                ["1", "0", "7", "0"],
                ["2", "1", "4", "3"],
            ]
    assert found[0] == found[1]
    assert found[0][0].clients == {"confusion": 2, "labels": 1}


@pytest.mark.parametrize(
    "changed", [{"evaluation": {"clients": 3}}, {"analytics": {"labels": True, "features": 2, "range": [0.0, 5.0]}}]
)
def test_an_evaluation_that_asked_for_something_else_is_void_after_a_restart(tmp_path, changed):
    worker = Worker(settings(tmp_path), DATA)
    worker.start()
    worker.perform(e.OpenTask(task(1)))
    worker.perform(e.Record(1, 1, "a", encoded(confusion=FIRST, labels=[1, 0, 4])))
    worker.close()
    worker = Worker(settings(tmp_path, **changed), DATA)
    restored = worker.start()
    assert restored.open_tasks == ()
    assert list(worker.replay(restored)) == []
    worker.close()


def test_without_rounds_each_client_has_a_task_of_its_own_and_its_counts_are_added(tmp_path):
    worker = Worker(settings(tmp_path, round={"mode": "buffered"}), DATA)
    worker.start()
    for number, (client, counts) in enumerate((("a", FIRST), ("b", SECOND)), 1):
        worker.perform(e.OpenTask(task(number, (client,))))
        worker.perform(e.Record(1, number, client, encoded(confusion=counts)))
    for number in (1, 2):
        worker.perform(e.CloseTask(1, number, "done"))
    worker.perform(finish())
    worker.close()
    with Ledger.read(tmp_path / "ledger.db") as ledger:
        assert json.loads(ledger.findings()[0])["confusion"] == [[3, 1, 1], [0, 7, 0], [1, 4, 3]]


def test_the_first_findings_and_the_newest_stay(tmp_path):
    worker = Worker(settings(tmp_path, analytics={"least": 1, "labels": True}), DATA)
    worker.start()
    for number in range(1, 5):
        worker.perform(e.OpenTask(task(number)))
        if number != 3:
            worker.perform(e.Record(1, number, "a", encoded(labels=[number, 0, 0])))
        worker.perform(e.CloseTask(1, number, "done"))
        worker.perform(finish(number))
    worker.close()
    with Ledger.read(tmp_path / "ledger.db") as ledger:
        assert [json.loads(data)["labels"][0] for data in ledger.findings()] == [1, 4]


def test_what_a_bundle_cannot_tell_is_refused_with_what_is_possible():
    floats = msgspec.structs.replace(
        BUNDLE.manifest, targets=(msgspec.structs.replace(BUNDLE.manifest.targets[0], dtype="float32"),)
    )
    for sections, key in (({}, "evaluation.confusion"), ({"evaluation": {"clients": 3}}, "analytics.labels")):
        with pytest.raises(
            ConfigError,
            match=rf"{key} needs one target of classes.*bundle 'toy' has none; possible with it: analytics.features, "
            "and the metrics loss, correct",
        ):
            Collection(settings(**sections), floats)
    tokens = msgspec.structs.replace(
        BUNDLE.manifest, inputs=(msgspec.structs.replace(BUNDLE.manifest.inputs[0], dtype="int64"),)
    )
    with pytest.raises(ConfigError, match=r"analytics.features needs an input of floats.*evaluation.confusion, analyt"):
        Collection(settings(), tokens)


def test_how_far_distributions_are_apart():
    assert drift([1, 1], [5, 5]) == 0
    assert drift([4, 0], [0, 3]) == 1
    assert drift([1, 1], [3, 1]) == 0.25
    assert drift([1, 1], [1, 1, 1]) is drift([0, 0], [1, 1]) is None
