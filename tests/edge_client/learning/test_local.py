"""Local training, a task at a time: what is said of it, and what is sent where training is bounded or did harm."""

import itertools

import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.codec.model import untrained
from edge_client.data import ArraySource
from edge_client.errors import TrainingError
from edge_client.learning.assignment import Assignment
from edge_client.learning.local import train
from edge_client.trainer import Trainer
from edge_client.wire.messages import RECEIVED_LOSS, TrainPlan
from tests.toy import reference_step, toy_bundle, toy_data

BUNDLE = Bundle.from_bytes(toy_bundle(buffer=True))
DATA = toy_data(50, 3, noise=4.0)


def assignment(plan, data=DATA, seed=5, trainer=None, stop=lambda: False):
    received = untrained(BUNDLE.layout, np.arange(5, dtype=np.float32))
    source = ArraySource(data)
    return Assignment(plan, seed, received, trainer or Trainer(BUNDLE), source, source, lambda name: None, stop)


def mean_loss(vector, arrays):
    views = BUNDLE.layout.views(vector)
    still = {name: np.zeros_like(view) for name, view in views.items()}
    return reference_step(views, still, views, arrays["x"], arrays["y"])[2]


def trained(epochs, left, seed=5, lr=0.1, batch_size=8):
    """Weights and buffers after each of so many epochs, from the trainer alone."""
    trainer = Trainer(BUNDLE)
    for epoch in range(epochs + 1):
        if not epoch:
            yield BUNDLE.initial(), np.arange(5, dtype=np.float32)
            continue
        plan = TrainPlan(epochs=epoch, batch_size=batch_size, hypers={"lr": lr})
        result = trainer.train(BUNDLE.initial(), left, plan, seed=seed, buffers=np.arange(5, dtype=np.float32))
        yield result.local, result.buffers


@pytest.mark.parametrize(("patience", "lr"), [(1, 0.1), (2, 1.0), (3, 2.0), (20, 2.0)])
def test_the_model_of_the_best_epoch_is_sent_with_its_buffers(patience, lr):
    plan = TrainPlan(epochs=12, batch_size=8, hypers={"lr": lr}, validation=0.3, patience=patience)
    learned = train(assignment(plan))
    left, aside = ArraySource(DATA).apart(0.3)
    (held,) = aside.batches(99, seed=None)
    models = list(trained(12, left, lr=lr))
    losses = [mean_loss(vector, held) for vector, _ in models]
    # Wait for so many epochs in a row without a loss below all before.
    best = last = 0
    for last in range(1, 13):
        if losses[last] < losses[best]:
            best = last
        if last - best >= patience:
            break
    steps = 5  # of 35 samples, 8 at a time
    np.testing.assert_allclose(learned.vectors["delta"], models[best][0] - BUNDLE.initial(), atol=1e-6)
    np.testing.assert_allclose(learned.vectors["buffers"], models[best][1])
    scalars = learned.scalars
    assert (scalars["epochs"], scalars["steps"], scalars["samples"]) == (last, steps * best, 35)
    assert scalars["distance"] == pytest.approx(lr * steps * best)
    assert scalars["validation.loss.before"] == pytest.approx(losses[0], rel=1e-5)
    assert scalars["validation.loss.after"] == pytest.approx(losses[best], rel=1e-5)


def test_where_training_did_harm_the_update_is_zeros_and_its_samples_count():
    plan = TrainPlan(epochs=9, batch_size=8, hypers={"lr": 1e4}, validation=0.3, patience=2)
    learned = train(assignment(plan))
    assert not learned.vectors["delta"].any()
    np.testing.assert_array_equal(learned.vectors["buffers"], np.arange(5))
    scalars = learned.scalars
    assert (scalars["epochs"], scalars["steps"], scalars["distance"], scalars["samples"]) == (2, 0, 0, 35)
    assert scalars["validation.loss.before"] == scalars["validation.loss.after"]


def test_the_same_samples_are_kept_aside_in_every_task():
    plan = TrainPlan(epochs=1, validation=0.3, patience=2)
    before = [train(assignment(plan, seed=seed)).scalars["validation.loss.before"] for seed in range(3)]
    assert len(set(before)) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_device_with_too_few_samples_trains_on_all_of_them_to_the_end(count):
    data = {name: array[:count] for name, array in DATA.items()}
    plan = TrainPlan(epochs=4, batch_size=2, validation=0.2, patience=1)
    bounded = train(assignment(plan, data))
    free = train(assignment(TrainPlan(epochs=4, batch_size=2), data))
    np.testing.assert_array_equal(bounded.vectors["delta"], free.vectors["delta"])
    assert bounded.vectors["delta"].any()
    assert (bounded.scalars["epochs"], bounded.scalars["samples"]) == (4, count)
    assert "validation.loss.before" not in bounded.scalars


def test_the_end_within_an_epoch_is_looked_at_too():
    plan = TrainPlan(steps=2, batch_size=8, validation=0.3, patience=5)
    learned = train(assignment(plan))
    assert learned.scalars["validation.loss.after"] < learned.scalars["validation.loss.before"]
    assert learned.scalars["steps"] == 2


def test_the_loss_of_what_was_received_is_that_of_what_is_trained_on():
    plan = TrainPlan(measure=True, validation=0.3, patience=1)
    (left,) = ArraySource(DATA).apart(0.3)[0].batches(99, seed=None)
    found = train(assignment(plan)).scalars
    assert found[RECEIVED_LOSS] == pytest.approx(mean_loss(BUNDLE.initial(), left), rel=1e-5)


def test_an_update_that_was_bounded_in_time_counts_what_it_saw():
    seconds = itertools.count()  # each time that it is asked
    trainer = Trainer(BUNDLE, clock=lambda: float(next(seconds)))
    learned = train(assignment(TrainPlan(epochs=99, batch_size=8, seconds=1e-3), trainer=trainer))
    assert (learned.scalars["steps"], learned.scalars["samples"]) == (1, 8)
    assert learned.vectors["delta"].any()


def test_a_task_that_the_server_gave_up_is_not_looked_at_any_more():
    stop = iter([False] * 3 + [True] * 9)
    plan = TrainPlan(epochs=9, batch_size=8, validation=0.3, patience=1)
    with pytest.raises(TrainingError, match="stopped"):
        train(assignment(plan, stop=lambda: next(stop)))
