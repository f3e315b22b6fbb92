"""One task: the right model in, the trained difference out, and a reason for whatever does not work."""

import msgspec
import numpy as np
import pytest

from edge_client import events as e
from edge_client.bundle import Bundle
from edge_client.codec.lattice import LatticeState, encode_delta, origin
from edge_client.codec.model import Model, encode_model_delta, untrained
from edge_client.codec.update import decode_scalars, decode_update
from edge_client.data import ArraySource
from edge_client.errors import StoreError
from edge_client.session import NO_HASH
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire import messages as m
from edge_client.worker import Worker
from tests.toy import toy_bundle, toy_data

BUNDLE = Bundle.from_bytes(toy_bundle())
SIZE = BUNDLE.layout.size
ZERO = origin(SIZE)
MOVED = LatticeState(-8, np.arange(SIZE, dtype=np.int32) - 3)
DIGEST = bytes.fromhex(BUNDLE.digest)


def invitation(task=1, state=ZERO, version=0, held=0, delta=None, **changes):
    plain = m.Invitation(
        1, task, 1, "train", m.TrainPlan(epochs=2, batch_size=8), m.UpdatePlan(step=1.0), 5, 60.0, held, version,
        state.digest(), None,
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
    coarse = m.UpdatePlan(step=4.0, dead_zone=1.0)
    sent = delta_of(worker.perform(invitation(update=coarse), trainer, never).update)
    worker.store.settle(1, 1, recorded=True)
    residual = plain - sent
    assert np.abs(residual).max() > 0
    other = invitation(2, update=m.UpdatePlan(step=0.01))
    alone = m.UpdatePlan(step=0.01, feedback=False)
    without = delta_of(worker.perform(msgspec_update(other, alone), trainer, never).update)
    with_it = delta_of(worker.perform(other, trainer, never).update)
    np.testing.assert_allclose(with_it - without, residual, atol=0.05 * np.abs(residual).max())


def msgspec_update(work, plan):
    return e.Work(msgspec.structs.replace(work.invitation, update=plan), work.delta)


def test_a_delta_brings_the_model_to_its_version_and_the_copy_is_kept(worker, trainer):
    delta = encode_delta(ZERO, MOVED, BUNDLE.layout)
    answer = worker.perform(invitation(state=MOVED, version=3, delta=delta), trainer, never)
    assert isinstance(answer, e.Finished)
    assert (answer.version, answer.digest) == (3, MOVED.digest())
    assert worker.copies.load(MOVED.digest(), BUNDLE.layout).digest() == MOVED.digest()
    again = worker.perform(invitation(2, state=MOVED, version=3, held=3), trainer, never)
    assert isinstance(again, e.Finished)
    further = LatticeState(-8, MOVED.k + 1)
    delta = encode_delta(MOVED, further, BUNDLE.layout)
    last = worker.perform(invitation(3, state=further, version=4, held=3, delta=delta), trainer, never)
    assert (last.version, last.digest) == (4, further.digest())
    assert worker.copies.load(MOVED.digest(), BUNDLE.layout) is None


def test_evaluation_sends_sums_and_no_vector(worker, trainer):
    answer = worker.perform(invitation(kind="evaluate"), trainer, never)
    scalars = decode_scalars(answer.update)
    assert decode_update(answer.update, {}).vectors == {}
    assert (scalars["samples"], scalars["sum.count"]) == (10, 10)
    assert worker.store.residual() is None


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


def test_a_damaged_residual_is_left_out(worker, trainer):
    worker.store.commit(1, 1, b"u", b"damaged", version=0, digest=NO_HASH)
    worker.store.settle(1, 1, recorded=True)
    assert isinstance(worker.perform(invitation(2), trainer, never), e.Finished)


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
    delta = encode_delta(ZERO, MOVED, BUNDLE.layout)
    answer = worker.perform(invitation(state=MOVED, version=3, delta=delta), trainer, never)
    assert answer == e.Failed(1, 1, "cannot write update-1.bin: No space left on device", 0, NO_HASH)


def test_buffers_come_from_the_model_and_go_back_with_the_update(tmp_path, trainer):
    bundle = Bundle.from_bytes(toy_bundle(buffer=True))
    layouts = {"delta": bundle.layout, "buffers": bundle.manifest.layout("buffer")}
    store = Store(tmp_path)
    store.install(bytes.fromhex(bundle.digest), b"bundle")
    source = ArraySource(toy_data(40, seed=1))
    pi = Worker("pi", source, ArraySource(toy_data(10, seed=2)), store, FileCopies(tmp_path))
    first = untrained(SIZE, bundle.initial_buffers())
    moved = Model(MOVED, np.array([0.5] * 4 + [100], np.float32))
    buffered = Trainer(bundle)

    answer = pi.perform(
        invitation(state=moved, version=1, delta=encode_model_delta(first, moved, bundle.layout)), buffered, never
    )
    assert isinstance(answer, e.Finished)
    assert answer.digest == moved.digest()
    found = decode_update(answer.update, layouts).vectors["buffers"]
    assert found[4] == 100 + 2 * 40
    assert 0 < np.abs(found[:4] - 0.5).max() < 2

    # The same task from the copy at rest.
    again = pi.perform(invitation(2, state=moved, version=1, held=1), buffered, never)
    assert isinstance(again, e.Finished)
    np.testing.assert_array_equal(decode_update(again.update, layouts).vectors["buffers"], found)
