"""Blobs changed in every way, into the decoders of whoever takes them: bundles and deltas on a device, updates on the
server. A refusal is an answer, and what comes after it is as if nothing had been."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_server import events as e
from broker_server.config import Federation
from broker_server.records import Task
from broker_server.worker import Worker as ServerWorker
from edge_client import events as c
from edge_client.bundle import Bundle
from edge_client.codec.model import Model, encode_model_delta, untrained
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.data import ArraySource
from edge_client.errors import BundleError
from edge_client.manifest import update_layouts
from edge_client.reporting import report_layouts
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire import messages as m
from edge_client.worker import Worker
from tests.edge_client.codec.conftest import coded
from tests.hostile.mutate import mutate
from tests.toy import toy_bundle, toy_data

DATA = toy_bundle(buffer=True)
BUNDLE = Bundle.from_bytes(DATA)
EVALUATION = Task(epoch=1, task=1, round=1, kind="evaluate", version=0, cohort=("a",), plan=b"", opened=0.0)
SEEDS = st.integers(0, 2**32)


def changed(data: bytes, seed: int) -> bytes:
    """Bytes that are not those of before."""
    dice = random.Random(seed)
    while (found := mutate(data, dice)) == data:
        pass
    return found


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_a_bundle_that_is_not_whole_is_a_bundle_error_or_the_same_model(seed):
    try:
        bundle = Bundle.from_bytes(changed(DATA, seed))
    except BundleError:
        return
    np.testing.assert_array_equal(bundle.initial(), BUNDLE.initial())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's worker with an open task, and a second version to lead to."""
    folder = tmp_path_factory.mktemp("server")
    sections = {"federation": {"name": "toys", "bundle": "b", "state": str(folder)}}
    worker = ServerWorker(msgspec.convert(sections, Federation), DATA)
    worker.start()
    task = Task(epoch=1, task=1, round=1, kind="train", version=0, cohort=("a",), plan=b"", opened=0.0)
    worker.perform(e.OpenTask(task))
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory):
    """The server's worker with an open evaluation that asks for everything."""
    sections = {
        "federation": {"name": "toys", "bundle": "b", "state": str(tmp_path_factory.mktemp("evaluating"))},
        "evaluation": {"clients": 1, "confusion": True},
        "analytics": {"labels": True, "features": 4, "least": 1},
    }
    worker = ServerWorker(msgspec.convert(sections, Federation), DATA)
    worker.start()
    worker.perform(e.OpenTask(EVALUATION))
    yield worker
    worker.close()


def counts() -> bytes:
    """A valid update of an evaluation, whose counts may be changed into any others."""
    layouts = report_layouts(BUNDLE.manifest, m.ReportPlan(True, True, 4))
    rows = {"confusion": np.eye(3), "labels": np.array([1, 2, 3]), "features": np.zeros((4, 10))}
    vectors = {name: array.astype(np.float32).ravel() for name, array in rows.items()}
    return encode_update(vectors, layouts, {"samples": 9, "samples.held": 9, "sum.count": 9}, CodecSettings()).data


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_counts_that_are_none_are_refused_and_their_sums_stay_counts(evaluating, seed):
    before = dict(evaluating._collection._clients)
    answer = evaluating.perform(e.Record(1, 1, f"x{seed}", changed(counts(), seed)))
    assert isinstance(answer, e.Refused | e.Recorded)
    if isinstance(answer, e.Refused):
        assert evaluating._collection._clients == before
    for name, sums in evaluating._collection._sums.items():
        assert sums.dtype == np.int64
        assert 0 <= sums.min() <= sums.max() < 2**34 * evaluating._collection._clients[name]


def update() -> bytes:
    """A valid update."""
    rng = np.random.default_rng(1)
    layouts = update_layouts(BUNDLE.manifest)
    vectors = {name: rng.normal(0, 0.1, layout.size).astype(np.float32) for name, layout in layouts.items()}
    return encode_update(vectors, layouts, {"samples": 10.0}, CodecSettings()).data


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_an_update_that_is_not_one_is_refused_and_the_sum_stays_finite(server, seed):
    client = f"x{seed}"
    before = server._gathering._sum.updates
    answer = server.perform(e.Record(1, 1, client, changed(update(), seed)))
    assert isinstance(answer, e.Refused | e.Recorded)
    assert server._gathering._sum.updates in (before, before + isinstance(answer, e.Recorded))
    assert np.isfinite(server._gathering._sum.total).all()


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """A device's worker and its trainer."""
    folder = tmp_path_factory.mktemp("device")
    store = Store(folder, durable=False)
    store.install(bytes.fromhex(BUNDLE.digest), DATA)
    source = ArraySource(toy_data(20, seed=1))
    return Worker("pi", source, source, store, FileCopies(folder)), Trainer(BUNDLE)


FIRST = untrained(BUNDLE.layout, BUNDLE.initial_buffers())
SECOND = Model(coded(BUNDLE.layout, 1), FIRST.buffers)
DELTA = encode_model_delta(FIRST, SECOND)


def work(task: int, delta: bytes) -> c.Work:
    """A task from version 1, which this delta should lead to."""
    plans = m.TrainPlan(), m.UpdatePlan()
    return c.Work(m.Invitation(1, task, 1, "train", *plans, 5, 60.0, 0, 1, SECOND.digest()), delta)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_a_delta_that_is_not_one_costs_its_task_and_the_next_one_is_done(device, seed):
    worker, trainer = device
    worker.store.hold(0, bytes(32))
    answer = worker.perform(work(seed, changed(DELTA, seed)), trainer, lambda: False)
    if isinstance(answer, c.Failed):
        assert (answer.version, answer.digest) == (0, bytes(32))
        answer = worker.perform(work(seed, DELTA), trainer, lambda: False)
    assert isinstance(answer, c.Finished)
    assert answer.digest == SECOND.digest()
    # The next example's model comes by its delta again, and not from the copy.
    for copy in worker.store.folder.glob("model-*.bin"):
        copy.unlink()
