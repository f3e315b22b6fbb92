"""One task: the right model in, the trained difference out, and a reason for whatever does not work."""

import dataclasses
import sys

import msgspec
import numpy as np
import pytest

from edge_client import events as e
from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import Model, encode_model_delta, untrained
from edge_client.codec.update import decode_scalars, decode_update, vector_names
from edge_client.codec.versions import CodedState, encode_delta
from edge_client.data import ArraySource
from edge_client.errors import StoreError
from edge_client.feedback import pack_residual
from edge_client.held import NO_HASH
from edge_client.reporting import report_layouts, sharing
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire import messages as m
from edge_client.worker import Worker
from tests.edge_client.codec.conftest import coded
from tests.edge_client.test_store import Faults, PowerCut
from tests.toy import toy_bundle, toy_data

BUNDLE = Bundle.from_bytes(toy_bundle())
SIZE = BUNDLE.layout.size
ZERO = CodedState(BUNDLE.layout)
MOVED = coded(BUNDLE.layout, 1)
DIGEST = bytes.fromhex(BUNDLE.digest)


def invitation(task=1, state=ZERO, version=0, held=0, delta=None, **changes):
    plain = m.Invitation(
        1, task, 1, "train", m.TrainPlan(epochs=2, batch_size=8), m.UpdatePlan(target="step", value=1.0), 5, 60.0, held,
        version, state.digest(), None,
    )  # fmt: skip
    return e.Work(msgspec.structs.replace(plain, **changes), delta)


@pytest.fixture
def worker(tmp_path):
    store = Store(tmp_path)
    store.install(DIGEST, b"bundle")
    source = ArraySource(toy_data(40, seed=1))
    return Worker("pi", source, ArraySource(toy_data(10, seed=2)), store, FileCopies(tmp_path))


@pytest.fixture(scope="module")
def trainer():
    return Trainer(BUNDLE)


def never():
    return False


def delta_of(update):
    return decode_update(update, {"delta": BUNDLE.layout}).vectors["delta"]


def test_a_task_trains_stores_and_answers(worker, trainer):
    work = invitation(update=m.UpdatePlan("none"))
    answer = worker.perform(work, trainer, never)
    assert isinstance(answer, e.Finished)
    assert (answer.epoch, answer.task, answer.version, answer.digest) == (1, 1, 0, ZERO.digest())
    expected = trainer.train(
        BUNDLE.initial(), worker.train, work.invitation.plan, seed=worker._seed(work.invitation)
    ).local
    np.testing.assert_array_equal(delta_of(answer.update), expected - BUNDLE.initial())
    scalars = decode_scalars(answer.update)
    assert (scalars["samples"], scalars["steps"], scalars["sum.count"]) == (40, 10, 40)
    held = worker.store.held()
    assert (held.version, held.digest, held.pending.update) == (0, ZERO.digest(), answer.update)


def test_the_same_task_gives_the_same_bytes_and_another_client_other_ones(worker, trainer):
    work = invitation(update=m.UpdatePlan("none"))
    first = delta_of(worker.perform(work, trainer, never).update)
    np.testing.assert_array_equal(delta_of(worker.perform(work, trainer, never).update), first)
    other = Worker("pi-2", worker.train, worker.test, worker.store, worker.copies)
    assert not np.array_equal(delta_of(other.perform(work, trainer, never).update), first)


def test_the_order_of_the_samples_follows_the_round_and_survives_a_restart_of_the_server(worker, trainer):
    def trained(**changes):
        return delta_of(worker.perform(invitation(update=m.UpdatePlan("none"), **changes), trainer, never).update)

    first = trained()
    np.testing.assert_array_equal(trained(task=7, epoch=3), first)
    assert not np.array_equal(trained(round=2), first)
    assert not np.array_equal(trained(seed=6), first)


def test_what_the_encoding_lost_is_added_to_the_next_update(worker, trainer):
    plain = delta_of(worker.perform(invitation(update=m.UpdatePlan("none")), trainer, never).update)
    coarse = m.UpdatePlan(target="step", value=4.0)
    sent = delta_of(worker.perform(invitation(update=coarse), trainer, never).update)
    worker.store.settle(1, 1, recorded=True)
    residual = plain - sent
    assert np.abs(residual).max() > 0
    other = invitation(2, update=m.UpdatePlan(target="step", value=0.01))
    alone = m.UpdatePlan(target="step", value=0.01, feedback="none")
    without = delta_of(worker.perform(msgspec_update(other, alone), trainer, never).update)
    with_it = delta_of(worker.perform(other, trainer, never).update)
    np.testing.assert_allclose(with_it - without, residual, atol=0.05 * np.abs(residual).max())


def msgspec_update(work, plan):
    return e.Work(msgspec.structs.replace(work.invitation, update=plan), work.delta)


def test_a_delta_brings_the_model_to_its_version_and_the_copy_is_kept(worker, trainer):
    delta = encode_delta(ZERO, MOVED)
    answer = worker.perform(invitation(state=MOVED, version=3, delta=delta), trainer, never)
    assert isinstance(answer, e.Finished)
    assert (answer.version, answer.digest) == (3, MOVED.digest())
    assert worker.copies.load(MOVED.digest(), BUNDLE.layout).digest() == MOVED.digest()
    again = worker.perform(invitation(2, state=MOVED, version=3, held=3), trainer, never)
    assert isinstance(again, e.Finished)
    further = coded(BUNDLE.layout, 1, 2)
    delta = encode_delta(MOVED, further)
    last = worker.perform(invitation(3, state=further, version=4, held=3, delta=delta), trainer, never)
    assert (last.version, last.digest) == (4, further.digest())
    assert worker.copies.load(MOVED.digest(), BUNDLE.layout) is None


@pytest.mark.parametrize("feedback", ["residual", "length"])
def test_an_update_in_which_nothing_is_told_counts_and_is_kept_for_the_next(worker, trainer, feedback):
    plain = delta_of(worker.perform(invitation(update=m.UpdatePlan("none")), trainer, never).update)
    silent = m.UpdatePlan(target="absolute", value=1e3, feedback=feedback)
    answer = worker.perform(invitation(update=silent), trainer, never)
    assert not delta_of(answer.update).any()
    assert decode_scalars(answer.update)["samples"] == 40
    worker.store.settle(1, 1, recorded=True)
    both = delta_of(worker.perform(invitation(2, update=m.UpdatePlan("none")), trainer, never).update)
    once = 2 if feedback == "residual" else 1
    np.testing.assert_allclose(both, once * plain, atol=0.01 * np.abs(plain).max())


def test_evaluation_sends_sums_and_no_vector(worker, trainer):
    answer = worker.perform(invitation(kind="evaluate"), trainer, never)
    scalars = decode_scalars(answer.update)
    assert decode_update(answer.update, {}).vectors == {}
    assert (scalars["samples"], scalars["sum.count"]) == (10, 10)
    assert worker.store.residual() is None


def test_in_an_evaluation_the_bytes_hold_what_the_owner_shares_and_nothing_else(worker, trainer):
    asked = m.TrainPlan(report=m.ReportPlan(confusion=True, labels=True, bins=8))
    layouts = report_layouts(BUNDLE.manifest, asked.report)
    silent = worker.perform(invitation(kind="evaluate"), trainer, never).update
    sizes = []
    for task, shares in enumerate(("nothing", "", "labels", "labels,features"), 2):
        device = dataclasses.replace(worker, shares=sharing(shares))
        update = device.perform(invitation(task, kind="evaluate", plan=asked), trainer, never).update
        names = vector_names(update)
        vectors = decode_update(update, {name: layouts[name] for name in names}).vectors
        assert names == {"nothing": set()}.get(shares, {"confusion", *shares.split(",")} - {""})
        if "labels" in names:
            assert vectors["labels"].tolist() == np.bincount(toy_data(40, seed=1)["y"], minlength=3).tolist()
        sizes.append(len(update))
        if shares == "nothing":
            assert update == silent, "to the byte"
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("delta", [b"garbage", None, b""])
def test_a_model_that_cannot_be_had_fails_the_task_and_the_next_starts_anew(worker, trainer, delta):
    worker.store.hold(2, MOVED.digest())  # and no copy of it
    answer = worker.perform(invitation(state=MOVED, version=3, held=2, delta=delta), trainer, never)
    assert isinstance(answer, e.Failed)
    assert (answer.version, answer.digest) == (0, NO_HASH)
    assert (worker.store.held().version, worker.store.held().digest) == (0, NO_HASH)


def test_another_digest_than_the_server_says_fails_the_task(worker, trainer):
    answer = worker.perform(invitation(digest=MOVED.digest()), trainer, never)
    assert isinstance(answer, e.Failed)
    assert MOVED.digest().hex()[:12] in answer.reason


FLAT = Layout((TensorSpec("flat", (SIZE,)),))
USELESS = {
    "damaged": b"damaged",
    "of another layout": pack_residual(np.ones(SIZE, np.float32), FLAT, 0),
    "of a version that is gone": pack_residual(np.ones(SIZE, np.float32), BUNDLE.layout, 7),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_residual_that_cannot_be_used_is_left_out_and_replaced(worker, trainer, name):
    exact = m.UpdatePlan("none")
    plain = delta_of(worker.perform(invitation(update=exact), trainer, never).update)
    worker.store.commit(1, 1, b"u", USELESS[name], version=0, digest=NO_HASH)
    worker.store.settle(1, 1, recorded=True)
    answer = worker.perform(invitation(2, update=exact), trainer, never)
    np.testing.assert_array_equal(delta_of(answer.update), plain)
    worker.store.settle(1, 2, recorded=True)
    assert worker.store.residual() is None


def test_without_quantization_the_residual_is_sent_in_full_and_none_is_left(worker, trainer):
    exact = m.UpdatePlan("none")
    plain = delta_of(worker.perform(invitation(update=exact), trainer, never).update)
    sent = delta_of(worker.perform(invitation(2, update=m.UpdatePlan(target="step", value=4.0)), trainer, never).update)
    worker.store.settle(1, 2, recorded=True)
    rest = delta_of(worker.perform(invitation(3, update=exact), trainer, never).update)
    np.testing.assert_allclose(sent + rest, 2 * plain, atol=0.02 * np.abs(plain).max())
    worker.store.settle(1, 3, recorded=True)
    assert worker.store.residual() is None


def test_without_feedback_nothing_is_added_and_what_was_kept_is_forgotten_with_the_receipt(worker, trainer):
    alone = invitation(2, update=m.UpdatePlan(target="step", value=4.0, feedback="none"))
    plain = worker.perform(alone, trainer, never).update
    worker.perform(invitation(1, update=m.UpdatePlan(target="step", value=4.0)), trainer, never)
    worker.store.settle(1, 1, recorded=True)
    kept = worker.store.residual()
    assert delta_of(worker.perform(alone, trainer, never).update).tolist() == delta_of(plain).tolist()
    worker.store.settle(1, 2, recorded=False)
    assert worker.store.residual() == kept
    worker.perform(alone, trainer, never)
    worker.store.settle(1, 2, recorded=True)
    assert worker.store.residual() is None


def test_an_update_can_be_made_as_long_as_what_was_learned(tmp_path):
    pi, tutor, layout = wide(tmp_path)

    def told(feedback, **rate):
        work = invitation(state=CodedState(layout), update=m.UpdatePlan(feedback=feedback, **rate))
        update = pi.perform(work, tutor, never).update
        return len(update), decode_update(update, {"delta": layout}).vectors["delta"]

    _, learned = told("none", kind="none")
    few, short = told("none", target="step", value=2.0)
    same, long = told("length", target="step", value=2.0)
    assert same == pytest.approx(few, rel=0.02)
    assert np.linalg.norm(short) < 0.97 * np.linalg.norm(learned)
    assert np.linalg.norm(long) == pytest.approx(np.linalg.norm(learned), rel=0.01)
    assert np.array_equal(told("length", kind="none")[1], learned)
    pi.store.settle(1, 1, recorded=True)
    assert pi.store.residual() is None


def test_where_it_is_asked_for_the_model_as_received_is_measured_on_what_is_trained_on(worker, trainer):
    plan = m.TrainPlan(epochs=2, batch_size=8, measure=True)
    answer = worker.perform(invitation(plan=plan, update=m.UpdatePlan("none")), trainer, never)
    sums = trainer.evaluate(BUNDLE.initial(), worker.train)
    scalars = decode_scalars(answer.update)
    assert scalars[m.RECEIVED_LOSS] == pytest.approx(sums["loss"] / 40, rel=1e-6)
    assert scalars[m.RECEIVED_LOSS] > scalars["loss"] > 0
    plain = worker.perform(invitation(2, update=m.UpdatePlan("none")), trainer, never)
    assert m.RECEIVED_LOSS not in decode_scalars(plain.update)
    np.testing.assert_array_equal(delta_of(answer.update), delta_of(plain.update), "training is the same")


@pytest.mark.parametrize("target", ["bits", "nmse", "bytes", "step", "absolute"])
def test_where_the_model_as_received_is_the_best_an_update_of_zeros_is_sent(worker, trainer, target):
    plan = m.TrainPlan(epochs=9, batch_size=8, hypers={"lr": 1e4}, validation=0.25, patience=1)
    value = 64.0 if target == "bytes" else 0.5
    answer = worker.perform(invitation(plan=plan, update=m.UpdatePlan(target=target, value=value)), trainer, never)
    assert not delta_of(answer.update).any()
    scalars = decode_scalars(answer.update)
    assert (scalars["samples"], scalars["steps"], scalars["distance"], scalars["epochs"]) == (30, 0, 0, 1)


def test_an_update_that_is_not_finite_leaves_the_residual_as_it_is(worker, trainer):
    worker.perform(invitation(1, update=m.UpdatePlan(target="step", value=4.0)), trainer, never)
    worker.store.settle(1, 1, recorded=True)
    kept = worker.store.residual()
    diverging = invitation(2, plan=m.TrainPlan(hypers={"lr": 1e30, "weight_decay": 1e30}))
    with np.errstate(all="ignore"):
        assert np.isnan(delta_of(worker.perform(diverging, trainer, never).update)).all()
    worker.store.settle(1, 2, recorded=True)
    assert worker.store.residual() == kept


def wide(tmp_path):
    """A worker whose update is large enough for a rate to be kept."""
    bundle = Bundle.from_bytes(toy_bundle(features=40, hidden=100))
    store = Store(tmp_path)
    store.install(bytes.fromhex(bundle.digest), b"bundle")
    source = ArraySource(toy_data(40, seed=1, features=40))
    return Worker("pi", source, source, store, FileCopies(tmp_path)), Trainer(bundle), bundle.layout


RATES = {
    "nothing": (m.UpdatePlan(target="step", value=1.0), None),
    "a rate below the limit": (m.UpdatePlan(target="step", value=4.0, limit=10_000), None),
    "a limit below the rate": (m.UpdatePlan(target="step", value=0.1, limit=500), 500),
    "a limit below the bits": (m.UpdatePlan(target="bits", value=8.0, limit=700), 700),
    "a limit below the bytes": (m.UpdatePlan(target="bytes", value=2000.0, limit=500), 500),
    "bytes below the limit": (m.UpdatePlan(target="bytes", value=500.0, limit=2000), 500),
    "a step in units of parameters": (m.UpdatePlan(target="absolute", value=1e-4, limit=400), 400),
    "a limit above all": (m.UpdatePlan(target="bytes", value=500.0, limit=2**34), 500),
}


@pytest.mark.parametrize("name", RATES)
def test_a_limit_bounds_the_bytes_whatever_the_target(tmp_path, name):
    plan, wanted = RATES[name]
    pi, tutor, layout = wide(tmp_path)
    work = invitation(state=CodedState(layout), update=plan)
    answer = pi.perform(work, tutor, never)
    assert isinstance(answer, e.Finished)
    free = pi.perform(msgspec_update(work, msgspec.structs.replace(plan, limit=0)), tutor, never)
    if wanted is None:
        np.testing.assert_array_equal(
            *(decode_update(one.update, {"delta": layout}).vectors["delta"] for one in (answer, free))
        )
    else:
        assert 0.8 * wanted < len(answer.update) <= 1.05 * wanted


def test_without_quantization_there_is_no_limit(tmp_path):
    pi, tutor, layout = wide(tmp_path)
    answer = pi.perform(invitation(state=CodedState(layout), update=m.UpdatePlan("none", limit=100)), tutor, never)
    assert len(answer.update) > 4 * layout.size


def test_a_rate_that_cannot_be_kept_fails_the_task_and_keeps_the_copy(worker, trainer):
    worker.store.hold(3, ZERO.digest())
    answer = worker.perform(invitation(update=m.UpdatePlan(target="nmse", value=50.0)), trainer, never)
    assert isinstance(answer, e.Failed)
    assert "rate" in answer.reason
    assert answer.version == 3


# Fates of one task after another: the plan, and what the server says of the update.
EXACT, COARSE = m.UpdatePlan("none"), m.UpdatePlan(target="step", value=4.0)
CAREER = [
    (COARSE, ["recorded"]),
    (COARSE, ["refused"]),
    (m.UpdatePlan(target="step", value=2.0), ["recorded", "recorded"]),
    (COARSE, ["recorded", "void"]),
    (COARSE, ["late"]),
    (m.UpdatePlan(target="step", value=8.0), ["recorded"]),
    (EXACT, ["recorded"]),
]


class Server:
    """Keeps the first update of each task and says the same of it each time; its receipts may get lost."""

    def __init__(self):
        self.updates = {}

    def receipts(self, task, update):
        self.updates.setdefault(task, update)
        return CAREER[task - 1][1]

    @property
    def deltas(self):
        return [delta_of(self.updates[task]) for task in range(1, len(CAREER) + 1)]

    @property
    def total(self):
        counts = [statuses[-1] == "recorded" for _, statuses in CAREER]
        return np.sum(np.array(self.deltas)[counts], axis=0)


def career(folder, trainer, server, task=1):
    """Go through the tasks from this one on, as session and driver do after a start; returns how far it came."""
    store = Store(folder, durable=False)
    source = ArraySource(toy_data(16, seed=1))
    pi = Worker("pi", source, source, store, FileCopies(folder))
    pending = store.held().pending
    if pending is not None:
        for status in server.receipts(pending.task, pending.update):
            store.settle(1, pending.task, recorded=status == "recorded")
        task = pending.task + 1
    for number in range(task, len(CAREER) + 1):
        yield number
        # What the server has said of a void task comes again before the next invitation; old receipts may, too.
        for before in (number - 1, 1):
            if before in server.updates and CAREER[before - 1][1][-1] != "recorded":
                store.settle(1, before, recorded=False)
        if number in server.updates:
            continue  # the server has it, so it does not ask again
        plan = m.TrainPlan(steps=1, batch_size=8)
        answer = pi.perform(invitation(number, round=number, plan=plan, update=CAREER[number - 1][0]), trainer, never)
        assert isinstance(answer, e.Finished)
        for status in server.receipts(number, answer.update):
            store.settle(1, number, recorded=status == "recorded")


def started(folder):
    store = Store(folder, durable=False)
    store.install(DIGEST, b"bundle")


def test_what_counts_adds_up_to_what_was_learned_whatever_the_receipts_say(tmp_path, trainer, monkeypatch):
    started(tmp_path / "exact")
    started(tmp_path / "coarse")
    coarse, exact = Server(), Server()
    list(career(tmp_path / "coarse", trainer, coarse))
    monkeypatch.setattr(sys.modules[__name__], "CAREER", [(EXACT, statuses) for _, statuses in CAREER])
    list(career(tmp_path / "exact", trainer, exact))
    learned = [np.abs(delta_of(update)).max() for update in exact.updates.values()]
    assert coarse.updates.keys() == exact.updates.keys()
    assert any(len(coarse.updates[task]) < len(exact.updates[task]) for task in coarse.updates)
    np.testing.assert_allclose(coarse.total, exact.total, atol=0.02 * max(learned))


def test_a_power_cut_at_any_file_operation_of_any_task_changes_no_bit_of_what_counts(tmp_path, trainer):
    def run(name, cut):
        started(tmp_path / name)
        server, at = Server(), 1
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, cut)
            try:
                for number in career(tmp_path / name, trainer, server):
                    at = number
            except PowerCut:
                pass
            else:
                return server, faults.count
        list(career(tmp_path / name, trainer, server, at))
        return server, faults.count

    whole, steps = run("whole", -1)
    assert steps > 50
    for cut in range(steps):
        np.testing.assert_array_equal(run(str(cut), cut)[0].deltas, whole.deltas)


def test_a_task_that_is_stopped_fails_and_leaves_nothing(worker, trainer):
    answer = worker.perform(invitation(), trainer, lambda: True)
    assert answer == e.Failed(1, 1, "stopped: the server has moved on", 0, NO_HASH)
    assert worker.store.held().pending is None


def test_an_unknown_hyper_fails_the_task(worker, trainer):
    answer = worker.perform(invitation(plan=m.TrainPlan(hypers={"lrr": 1.0})), trainer, never)
    assert isinstance(answer, e.Failed)
    assert "lrr" in answer.reason


def test_a_store_that_cannot_be_written_fails_the_task_with_what_is_still_held(worker, trainer, monkeypatch):
    def full(*_, **__):
        raise StoreError("cannot write update-1.bin: No space left on device")

    monkeypatch.setattr(worker.store, "commit", full)
    delta = encode_delta(ZERO, MOVED)
    answer = worker.perform(invitation(state=MOVED, version=3, delta=delta), trainer, never)
    assert answer == e.Failed(1, 1, "cannot write update-1.bin: No space left on device", 0, NO_HASH)


def test_buffers_come_from_the_model_and_go_back_with_the_update(tmp_path, trainer):
    bundle = Bundle.from_bytes(toy_bundle(buffer=True))
    layouts = {"delta": bundle.layout, "buffers": bundle.manifest.layout("buffer")}
    store = Store(tmp_path)
    store.install(bytes.fromhex(bundle.digest), b"bundle")
    source = ArraySource(toy_data(40, seed=1))
    pi = Worker("pi", source, ArraySource(toy_data(10, seed=2)), store, FileCopies(tmp_path))
    first = untrained(BUNDLE.layout, bundle.initial_buffers())
    moved = Model(MOVED, np.array([0.5] * 4 + [100], np.float32))
    buffered = Trainer(bundle)

    answer = pi.perform(invitation(state=moved, version=1, delta=encode_model_delta(first, moved)), buffered, never)
    assert isinstance(answer, e.Finished)
    assert answer.digest == moved.digest()
    found = decode_update(answer.update, layouts).vectors["buffers"]
    assert found[4] == 100 + 2 * 40
    assert 0 < np.abs(found[:4] - 0.5).max() < 2

    # The same task from the copy at rest.
    again = pi.perform(invitation(2, state=moved, version=1, held=1), buffered, never)
    assert isinstance(again, e.Finished)
    np.testing.assert_array_equal(decode_update(again.update, layouts).vectors["buffers"], found)
