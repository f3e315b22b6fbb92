import math

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from broker_server import events as e
from broker_server.config import Federation
from broker_server.ledger import Ledger
from broker_server.records import Round, Task
from broker_server.worker import Worker
from edge_client.bundle import Bundle
from edge_client.codec.model import apply_model_delta, untrained
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.codec.versions import CodedState, apply_delta
from edge_client.errors import BundleError, DataError, LedgerError
from edge_client.wire import transfer
from tests.toy import toy_bundle, toy_data

DATA = toy_bundle()
BUNDLE = Bundle.from_bytes(DATA)
LAYOUTS = {"delta": BUNDLE.layout}
NONE = CodecSettings(kind="none")


def settings(folder, **sections) -> Federation:
    base = {"federation": {"name": "toys", "bundle": "b", "state": str(folder)}, "codec": {"kind": "none"}}
    return msgspec.convert(base | sections, Federation)


def task(number: int = 1, kind: str = "train", epoch: int = 1, version: int = 0) -> Task:
    return Task(epoch=epoch, task=number, round=1, kind=kind, version=version, cohort=("a", "b"), plan=b"", opened=5.0)


def delta(seed: int, scale: float = 0.1):
    return np.random.default_rng(seed).normal(0, scale, BUNDLE.layout.size).astype(np.float32)


def encoded(vector=None, samples: float = 10, **scalars: float) -> bytes:
    vectors = {} if vector is None else {"delta": vector}
    return encode_update(vectors, LAYOUTS if vectors else {}, {"samples": samples, **scalars}, NONE).data


def aggregate(number: int = 1, epoch: int = 1) -> e.Aggregate:
    result = Round(round=number, version=number, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0)
    return e.Aggregate(((epoch, number),), result, frozenset())


@pytest.fixture
def make(tmp_path):
    made = []

    def make(data: bytes = DATA, **sections) -> Worker:
        made.append(Worker(settings(tmp_path / "state", **sections), data))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def test_a_round_is_the_weighted_mean(make):
    worker = make()
    restored = worker.start()
    assert (restored.version, restored.last_task, restored.open_task) == (0, 0, None)
    assert worker.perform(e.OpenTask(task())) == e.Opened(1, 1)
    answer = worker.perform(e.Record(1, 1, "a", encoded(delta(1), 10, loss=0.5, odd=math.nan)))
    assert answer == e.Recorded(1, 1, "a", 10, {"samples": 10, "loss": 0.5})
    worker.perform(e.Record(1, 1, "b", encoded(delta(2), 30)))
    answer = worker.perform(aggregate())
    assert isinstance(answer, e.Aggregated)
    prepared = worker.perform(e.Prepare(0, 1))
    assert isinstance(prepared, e.Prepared)
    reached = apply_delta(CodedState(BUNDLE.layout), prepared.ref.inline, BUNDLE.layout)
    assert reached.digest() == answer.digest
    expected = BUNDLE.initial() + (10 * delta(1) + 30 * delta(2)) / 40
    np.testing.assert_allclose(reached.parameters(BUNDLE.initial()), expected, rtol=1e-5, atol=1e-6)


def test_what_is_said_of_aggregates_is_said_again_after_a_restart(make):
    worker = make(codec={})
    assert worker.start().pace == 0
    worker.perform(e.OpenTask(task()))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1))))
    answer = worker.perform(aggregate())
    assert isinstance(answer, e.Aggregated)
    assert 0 < answer.pace < 0.1
    worker.close()
    assert make(codec={}).start().pace == answer.pace


def test_a_duplicate_adds_nothing(make):
    once, twice = make(), None
    once.start()
    once.perform(e.OpenTask(task()))
    once.perform(e.Record(1, 1, "a", encoded(delta(1))))
    again = once.perform(e.Record(1, 1, "a", encoded(delta(2), 99)))
    assert isinstance(again, e.Recorded)
    answer = once.perform(aggregate())
    ref = once.perform(e.Prepare(0, 1)).ref
    twice = apply_delta(CodedState(BUNDLE.layout), ref.inline, BUNDLE.layout)
    np.testing.assert_allclose(twice.parameters(BUNDLE.initial()), BUNDLE.initial() + delta(1), rtol=1e-5, atol=1e-6)
    assert answer.version == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(np.full(BUNDLE.layout.size, np.nan, np.float32)), "NaN or infinite"),
        (encoded(np.full(BUNDLE.layout.size, np.inf, np.float32)), "NaN or infinite"),
        (encoded(delta(1, 1e12)), "values up to"),
        (encoded(delta(1), 0), "counts 0 samples"),
        (encoded(delta(1), math.nan), "counts nan samples"),
        (encoded(delta(1), -5), "counts -5 samples"),
        (encoded(delta(1), 1e12), "samples; expected 1 to"),
        (encoded(delta(1))[:-2], "fetch it again"),
        (encoded(delta(1)) + b"x", "update"),
        (b"", "update"),
        (b"rubbish", "not an update"),
        (encoded(), "other bundle"),
        (
            encode_update(
                {"delta": np.zeros(4, np.float32)},
                {"delta": Bundle.from_bytes(toy_bundle(1, 2)).layout},
                {"samples": 1},
                NONE,
            ).data,
            "another bundle",
        ),
    ],
    ids=[
        "nan",
        "inf",
        "diverged",
        "zero",
        "nan-samples",
        "negative",
        "huge",
        "cut",
        "long",
        "empty",
        "rubbish",
        "bare",
        "foreign",
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_no_trace(make, tmp_path, data, words):
    worker = make()
    worker.start()
    worker.perform(e.OpenTask(task()))
    answer = worker.perform(e.Record(1, 1, "a", data))
    assert isinstance(answer, e.Refused)
    assert words in answer.reason
    worker.perform(e.Record(1, 1, "b", encoded(delta(2))))
    worker.perform(aggregate())
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert ledger.recorded(1, 1) == ["b"]


def test_several_records_are_one_commit_and_a_bad_one_harms_no_other(make):
    worker = make()
    worker.start()
    worker.perform(e.OpenTask(task()))
    answers = worker.perform_all(
        [e.Record(1, 1, "a", encoded(delta(1))), e.Record(1, 1, "x", b"bad"), e.Record(1, 1, "b", encoded(delta(2)))]
    )
    assert [type(answer) for answer in answers] == [e.Recorded, e.Refused, e.Recorded]


@pytest.mark.parametrize("crash_after", [0, 1, 2])
def test_a_replay_gives_the_same_bits(tmp_path, crash_after):
    updates = [("a", encoded(delta(1), 7)), ("b", encoded(delta(2), 11)), ("c", encoded(delta(3), 13))]
    digests = []
    for name, crash in (("whole", 3), ("torn", crash_after)):
        worker = Worker(settings(tmp_path / name), DATA)
        first = worker.start()
        worker.perform(e.OpenTask(task()))
        for client, data in updates[:crash]:
            worker.perform(e.Record(1, 1, client, data))
        if crash < 3:
            worker.close()
            worker = Worker(settings(tmp_path / name), DATA)
            restored = worker.start()
            assert restored.epoch == first.epoch + 1
            assert restored.open_task is not None
            assert [event.client for event in worker.replay(restored)] == [client for client, _ in updates[:crash]]
            for client, data in updates[max(0, crash - 1) :]:  # one of them again
                worker.perform(e.Record(1, 1, client, data))
        digests.append(worker.perform(aggregate()).digest)
        worker.close()
    assert digests[0] == digests[1]


def test_of_several_open_tasks_the_last_goes_on(make, tmp_path):
    worker = make()
    worker.start()
    worker.perform(e.OpenTask(task(1)))
    worker.perform(e.OpenTask(task(2)))
    worker.close()
    restored = make().start()
    assert restored.open_task is not None
    assert restored.open_task.task == 2
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert ledger.outcome(1, 1) == "void"


def test_a_round_is_unfinished_until_the_coordinator_says_otherwise(make):
    worker = make()
    worker.start()
    worker.perform(e.OpenTask(task()))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1))))
    worker.perform(aggregate())
    worker.close()
    worker = make()
    assert worker.start().unfinished == 1
    worker.perform(e.FinishRound(aggregate().result, best=True))
    worker.close()
    assert make().start().unfinished is None


def test_inquiries(make):
    worker = make()
    worker.start()
    for number, outcome in ((1, "done"), (2, "void")):
        worker.perform(e.OpenTask(task(number)))
        worker.perform(e.Record(1, number, "a", encoded(delta(1))))
        worker.perform(e.CloseTask(1, number, outcome))
    asked = [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (9, "a")]
    answers = [worker.perform(e.Inquire(1, number, client)).status for number, client in asked]
    assert answers == ["recorded", "late", "void", "void", "late"]


def test_an_update_that_comes_again_after_its_task_is_forgotten_is_late_and_counts_no_second_time(make, monkeypatch):
    monkeypatch.setattr("broker_server.ledger.REMEMBERED", 4)
    worker = make()
    restored = worker.start()
    for number in range(1, 6):
        worker.perform(e.OpenTask(task(number, epoch=restored.epoch, version=number - 1)))
        worker.perform(e.Record(restored.epoch, number, "a", encoded(delta(number))))
        worker.perform(aggregate(number, restored.epoch))
    worker.close()
    again = make()
    restored_again = again.start()
    assert restored_again.version == 5
    assert list(again.replay(restored_again)) == []
    statuses = [again.perform(e.Inquire(restored.epoch, number, "a")).status for number in range(1, 6)]
    assert statuses == ["late", "late", "recorded", "recorded", "recorded"]
    assert restored_again.last_task == 5


def test_an_evaluation_task_takes_scalars_only(make):
    worker = make()
    worker.start()
    worker.perform(e.OpenTask(task(kind="evaluate")))
    data = encode_update({}, {}, {"samples": 5, "sum.count": 5, "sum.correct": 2}, CodecSettings()).data
    answer = worker.perform(e.Record(1, 1, "a", data))
    assert answer == e.Recorded(1, 1, "a", 5, {"samples": 5, "sum.count": 5, "sum.correct": 2})
    assert isinstance(worker.perform(e.Record(1, 1, "b", encoded(delta(1)))), e.Refused)


def test_the_server_evaluates_and_writes_models(make, tmp_path):
    np.savez(tmp_path / "test.npz", **toy_data(50))
    worker = make(evaluation={"data": str(tmp_path / "test.npz")})
    worker.start()
    answer = worker.perform(e.Evaluate(0))
    assert set(answer.metrics) >= {"loss", "accuracy"}
    worker.perform(e.OpenTask(task()))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1))))
    result = aggregate().result
    worker.perform(aggregate())
    worker.perform(e.FinishRound(result, best=True))
    reports = worker.write_models()
    assert {report.about["version"] for report in reports.values()} == {1}
    for folder in ("best", "last"):
        assert {entry.name for entry in (tmp_path / "state" / "models" / folder).iterdir()} >= {
            "infer.onnx",
            "infer.int8-dynamic.onnx",
            "global.safetensors",
        }


def test_chunks_come_from_what_was_built(make):
    worker = make(transfer={"inline": 0, "chunk": 1024})
    ref = worker.start().bundle
    assert ref.inline is None
    chunks = worker.chunks(ref, tuple(range(transfer.count(ref))))
    assert b"".join(data for _, data in chunks) == DATA
    worker.retain(["one", "two"])
    worker.release(["one"], ref)
    assert worker.chunks(ref, (0,)) == []
    worker.close()
    assert make(transfer={"inline": 0, "chunk": 1024}).start().leftovers == ("two",)


def test_bad_starts(make, tmp_path):
    with pytest.raises(BundleError):
        make(b"not a zip")
    np.savez(tmp_path / "bad.npz", **toy_data(5, features=7))
    with pytest.raises(DataError, match="7"):
        make(evaluation={"data": str(tmp_path / "bad.npz")})
    make().close()
    with pytest.raises(LedgerError, match="belongs to bundle"):
        make(toy_bundle(seed=9))


BUFFERED = toy_bundle(buffer=True)


def with_buffers(seed: int, mean: float, seen: float, samples: int) -> bytes:
    vectors = {"delta": delta(seed), "buffers": np.array([mean] * 4 + [seen], np.float32)}
    layouts = {"delta": BUNDLE.layout, "buffers": Bundle.from_bytes(BUFFERED).manifest.layout("buffer")}
    return encode_update(vectors, layouts, {"samples": samples}, NONE).data


def test_buffers_are_published_with_the_model(make, tmp_path):
    np.savez(tmp_path / "test.npz", **toy_data(50))
    worker = make(BUFFERED, evaluation={"data": str(tmp_path / "test.npz")})
    worker.start()
    worker.perform(e.OpenTask(task()))
    worker.perform(e.Record(1, 1, "a", with_buffers(1, 2.0, 40, 10)))
    worker.perform(e.Record(1, 1, "b", with_buffers(2, 4.0, 30, 30)))
    answer = worker.perform(aggregate())
    ref = worker.perform(e.Prepare(0, 1)).ref
    first = untrained(BUNDLE.layout, Bundle.from_bytes(BUFFERED).initial_buffers())
    reached = apply_model_delta(first, ref.inline, BUNDLE.layout)
    assert reached.digest() == answer.digest
    np.testing.assert_array_equal(reached.buffers, np.array([3.5] * 4 + [40], np.float32))
    assert set(worker.perform(e.Evaluate(1)).metrics) >= {"loss", "accuracy"}
    worker.perform(e.FinishRound(aggregate().result, best=True))
    worker.write_models()
    tensors = safetensors.numpy.load_file(tmp_path / "state" / "models" / "best" / "global.safetensors")
    np.testing.assert_array_equal(tensors["mean"], np.full(4, 3.5, np.float32))
    assert tensors["seen"] == np.int64(40)


@pytest.mark.parametrize("crash_after", [0, 1, 2])
def test_a_replay_gives_the_same_buffers(tmp_path, crash_after):
    updates = [
        ("a", with_buffers(1, 0.1, 9, 7)),
        ("b", with_buffers(2, 0.7, 8, 11)),
        ("c", with_buffers(3, 1.3, 7, 13)),
    ]
    digests = []
    for name, crash in (("whole", 3), ("torn", crash_after)):
        worker = Worker(settings(tmp_path / name), BUFFERED)
        worker.start()
        worker.perform(e.OpenTask(task()))
        for client, data in updates[:crash]:
            worker.perform(e.Record(1, 1, client, data))
        if crash < 3:
            worker.close()
            worker = Worker(settings(tmp_path / name), BUFFERED)
            list(worker.replay(worker.start()))
            for client, data in updates[crash:]:
                worker.perform(e.Record(1, 1, client, data))
        digests.append(worker.perform(aggregate()).digest)
        worker.close()
        again = Worker(settings(tmp_path / name), BUFFERED)
        assert again.start().digest == digests[-1]
        again.close()
    assert digests[0] == digests[1]


def test_buffers_that_are_not_numbers_are_refused(make):
    worker = make(BUFFERED)
    worker.start()
    worker.perform(e.OpenTask(task()))
    assert isinstance(worker.perform(e.Record(1, 1, "a", with_buffers(1, math.nan, 4, 10))), e.Refused)
    assert isinstance(worker.perform(e.Record(1, 1, "b", encoded(delta(1)))), e.Refused)


# Federations without rounds: tasks of one client each, discounted by age.


def one(number: int, client: str, version: int) -> e.OpenTask:
    return e.OpenTask(msgspec.structs.replace(task(number, version=version), cohort=(client,)))


def advance(number: int, *tasks: int) -> e.Aggregate:
    result = Round(round=number, version=number, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0)
    return e.Aggregate(tuple((1, task) for task in tasks), result, frozenset(range(number)))


def model(worker: Worker):
    made = worker.perform(e.Prepare(0, worker.start().version))
    return apply_delta(CodedState(BUNDLE.layout), made.ref.inline, BUNDLE.layout).parameters(BUNDLE.initial())


WITHOUT_ROUNDS = {"round": {"mode": "buffered", "staleness": 0.5}}


def test_an_old_update_counts_less(make):
    worker = make(**WITHOUT_ROUNDS)
    worker.start()
    for number, client in ((1, "a"), (2, "b"), (3, "c")):
        worker.perform(one(number, client, 0))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1), 10)))
    worker.perform(advance(1, 1))
    worker.perform(e.Record(1, 2, "b", encoded(delta(2), 10)))
    worker.perform(advance(2, 2))
    worker.perform(one(4, "a", 2))
    worker.perform(e.Record(1, 4, "a", encoded(delta(4), 20)))
    worker.perform(e.Record(1, 3, "c", encoded(delta(3), 30)))
    worker.perform(advance(3, 4, 3))
    last = (20 * delta(4) + 30 * 3**-0.5 * delta(3)) / 50
    expected = BUNDLE.initial() + delta(1) + 2**-0.5 * delta(2) + last
    np.testing.assert_allclose(model(worker), expected, rtol=1e-5, atol=1e-6)


def test_a_version_leaves_the_updates_of_other_tasks_to_the_next(make):
    worker = make(**WITHOUT_ROUNDS)
    worker.start()
    worker.perform(one(1, "a", 0))
    worker.perform(one(2, "b", 0))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1))))
    worker.perform(advance(1, 1))
    worker.perform(e.Record(1, 2, "b", encoded(delta(2))))
    worker.perform(one(3, "a", 1))
    worker.perform(e.CloseTask(1, 3, "void"))  # given up without an update: the sum stays
    worker.perform(advance(2, 2))
    np.testing.assert_allclose(model(worker), BUNDLE.initial() + delta(1) + 2**-0.5 * delta(2), rtol=1e-5, atol=1e-6)


def test_after_a_crash_the_ledger_gives_the_same_sums_bit_for_bit(make, tmp_path):
    """In ledger order and with the same discounts, whatever order the tasks were opened in."""
    digests = []
    for crash in (False, True):
        worker = make(
            federation={"name": "toys", "bundle": "b", "state": str(tmp_path / str(crash))}, codec={}, **WITHOUT_ROUNDS
        )
        worker.start()
        for number, client in ((1, "a"), (2, "b"), (3, "c"), (4, "d")):
            worker.perform(one(number, client, 0))
        worker.perform(e.Record(1, 2, "b", encoded(delta(2), 7)))
        worker.perform(advance(1, 2))
        worker.perform(one(5, "b", 1))
        for number, client, samples in ((5, "b", 11), (3, "c", 13), (1, "a", 17)):
            worker.perform(e.Record(1, number, client, encoded(delta(number), samples)))
        if crash:
            worker.close()
            worker = make(
                federation={"name": "toys", "bundle": "b", "state": str(tmp_path / str(crash))},
                codec={},
                **WITHOUT_ROUNDS,
            )
            restored = worker.start()
            assert [task.task for task in restored.open_tasks] == [1, 3, 4, 5]
            assert set(restored.digests) == {0, 1}
            again = list(worker.replay(restored))
            assert [(event.task, event.client, event.samples) for event in again] == [
                (5, "b", 11),
                (3, "c", 13),
                (1, "a", 17),
            ]
        answer = worker.perform(advance(2, 5, 3, 1))
        digests.append(answer.digest)
        assert worker.perform(e.Inquire(1, 3, "c")).status == "recorded"
    assert digests[0] == digests[1]


def test_a_delta_leads_to_an_older_version_too(make):
    worker = make(**WITHOUT_ROUNDS)
    worker.start()
    reached = []
    for number in (1, 2):
        worker.perform(one(number, "a", number - 1))
        worker.perform(e.Record(1, number, "a", encoded(delta(number))))
        reached.append(worker.perform(advance(number, number)).digest)
    prepared = worker.perform(e.Prepare(0, 1))
    assert prepared.version == 1
    assert apply_delta(CodedState(BUNDLE.layout), prepared.ref.inline, BUNDLE.layout).digest() == reached[0]


def test_what_is_open_when_the_mode_is_changed_is_void(make):
    worker = make(**WITHOUT_ROUNDS)
    worker.start()
    worker.perform(one(1, "a", 0))
    worker.perform(one(2, "b", 0))
    worker.perform(e.Record(1, 2, "b", encoded(delta(2))))
    worker.close()
    again = make()
    restored = again.start()
    assert restored.open_tasks == ()
    assert list(again.replay(restored)) == []
    assert again.perform(e.Inquire(1, 2, "b")).status == "void"


def test_an_update_beyond_the_norm_is_refused_and_one_within_it_is_not(make):
    worker = make(limits={"norm": 1.0})
    worker.start()
    worker.perform(e.OpenTask(task()))
    vector = delta(1)
    vector *= np.float32(0.99 / np.linalg.norm(vector))
    answer = worker.perform(e.Record(1, 1, "a", encoded(vector * np.float32(1.02))))
    assert isinstance(answer, e.Refused)
    assert "norm 1.01; limits.norm allows 1" in answer.reason
    assert isinstance(worker.perform(e.Record(1, 1, "b", encoded(vector))), e.Recorded)


def test_a_client_counts_as_no_more_samples_than_the_limit_and_a_replay_agrees(tmp_path):
    vectors, models = (delta(1), delta(2)), []
    for number, (limits, claimed) in enumerate([({"samples": 30}, 2**29 - 1), ({}, 30)]):
        name = str(tmp_path / str(number))
        for _ in range(2):  # the second time it is added up again
            worker = Worker(settings(name, limits=limits), DATA)
            restored = worker.start()
            for answer in worker.replay(restored):
                assert answer.samples in (30, 10)
            if not restored.open_tasks:
                worker.perform(e.OpenTask(task()))
                for client, vector, samples in (("a", vectors[0], claimed), ("b", vectors[1], 10)):
                    answer = worker.perform(e.Record(1, 1, client, encoded(vector, samples=samples)))
                    assert answer.samples == {"a": 30, "b": 10}[client]
                worker.close()
        models.append(worker.perform(aggregate()).digest)
        worker.close()
    assert models[0] == models[1]


def test_a_smaller_norm_does_not_undo_what_is_recorded(tmp_path):
    worker = Worker(settings(tmp_path), DATA)
    worker.start()
    worker.perform(e.OpenTask(task()))
    worker.perform(e.Record(1, 1, "a", encoded(delta(1))))
    worker.close()
    worker = Worker(settings(tmp_path, limits={"norm": 1e-6}), DATA)
    assert [answer.client for answer in worker.replay(worker.start())] == ["a"]
    worker.close()


def test_misconduct_goes_to_the_ledger(make, tmp_path):
    worker = make()
    worker.perform(e.Misconduct("x", "muted", "it floods", 60.0))
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        ((fault),) = ledger.misconduct()
    assert (fault.client, fault.kind, fault.reason, fault.seconds) == ("x", "muted", "it floods", 60.0)
    assert fault.time > 1.7e9


def test_a_restarted_server_knows_the_versions_that_a_delta_may_start_from(make):
    worker = make(**WITHOUT_ROUNDS, codec={"kind": "quantized"})
    worker.start()
    digests = {}
    for number in (1, 2, 3):
        worker.perform(one(number, "a", number - 1))
        worker.perform(e.Record(1, number, "a", encoded(delta(number))))
        digests[number] = worker.perform(advance(number, number)).digest
    assert worker.start().digests == digests
