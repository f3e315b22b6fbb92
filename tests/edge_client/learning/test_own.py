"""What a device serves after a restart, where it has a model of its own."""

import numpy as np
import pytest

from edge_client.device import Device, Workshop
from edge_client.learning.assignment import Assignment
from edge_client.learning.local import train
from edge_client.learning.own import DITTO
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.predict import Model as Predictor
from edge_client.shelf import Shelf
from edge_client.store import FileCopies, Store
from tests.edge_client.learning.rounds import Rounds, exported, personal, plan, sources


def test_what_was_fine_tuned_stays_after_a_restart_where_layers_are_personal_too(tmp_path):
    data, source = personal(exported(tmp_path / "net.fedge"), "head.*"), sources(1)
    shelf = Shelf(tmp_path / "model", durable=False)
    rounds = Rounds(tmp_path, data, source, shelf)
    for _ in range(2):
        rounds.train(plan(method="fine-tune"))
    rows = next(iter(source[0].batches(99, seed=None)))
    before = Predictor.open(tmp_path / "model").predict(x=rows["x"])["logits"]
    workshop = Workshop()
    Device(
        client="client-0",
        federation="nets",
        connect=lambda will: MemoryLink(MemoryBroker(), will=will),
        store=Store(tmp_path / "0", durable=False),
        copies=FileCopies(tmp_path / "0"),
        workshop=workshop,
        open_data=lambda manifest: (source[0], source[0]),
        log=lambda line: None,
        shelf=Shelf(tmp_path / "model", durable=False),
    )
    workshop.close()
    model = Predictor.open(tmp_path / "model")
    assert (model.version, model.description.personal) == (1, "fine-tune")
    np.testing.assert_array_equal(model.predict(x=rows["x"])["logits"], before)


def test_where_fine_tuning_diverges_the_model_before_it_is_served(tmp_path):
    source, shelf = sources(1), Shelf(tmp_path / "model", durable=False)
    rounds = Rounds(tmp_path, exported(tmp_path / "net.fedge"), source, shelf)
    asked = plan(method="fine-tune", own={"lr": 1e30, "weight_decay": 1e30})
    rounds.train(asked)
    (rows,) = source[0].batches(99, seed=None)
    assert np.isfinite(Predictor.open(tmp_path / "model").predict(x=rows["x"])["logits"]).all()
    scalars = rounds.evaluate(0, asked)
    assert scalars["personal.sum.loss"] == scalars["sum.loss"]


@pytest.mark.parametrize("serves", [True, False])
def test_a_model_of_its_own_that_nobody_uses_is_kept_and_not_held_in_memory(tmp_path, serves):
    rounds = Rounds(tmp_path, exported(tmp_path / "net.fedge"), sources(1))
    worker = rounds.workers[0]
    task = Assignment(
        plan(method="ditto"), 5, rounds.model, rounds.trainer, worker.train, worker.test, worker.store.recall,
        lambda: False, serves,
    )  # fmt: skip
    learned = train(task)
    assert set(learned.keeps) == {DITTO}
    assert (learned.serves is not None) == serves
