"""The recommender learns what users like, and no user's vector leaves its phone."""

import asyncio

import msgspec
import numpy as np
import torch

from broker_server.config import Federation
from broker_server.simulation import simulate
from edge_client.bundle import Bundle
from edge_client.data import ArraySource, split
from edge_client.emulator.partition import partition
from edge_client.learning.remembered import unpack_vector
from export.bundle import export_bundle
from export.models.ratings import ITEMS, USERS, tastes
from export.models.recommender import PERSONAL, recommender

HOLDOUT = 0.25


def baselines():
    """Root mean squared errors, on what the phones hold out, of the mean of all other ratings and of each item's."""
    arrays = tastes()
    user = arrays["user"]
    trained, tested = [], []
    for number, rows in enumerate(partition(user, USERS, "natural", users=user)):
        source = ArraySource({"x": arrays["x"], "y": arrays["y"]}, rows)
        for part, found in zip(split(source, HOLDOUT, number), (trained, tested), strict=True):
            found += part.batches(1000, seed=None)
    (items, ratings), (asked, wanted) = (
        [np.concatenate([batch[name].ravel() for batch in found]) for name in ("x", "y")] for found in (trained, tested)
    )
    of_item = np.array([ratings[items == item].mean() for item in range(ITEMS)])
    return [float(np.sqrt(np.mean((wanted - guess) ** 2))) for guess in (ratings.mean(), of_item[asked])]


def test_ratings_are_learned_better_than_by_means_and_the_user_stays_on_the_phone(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "recommender.fedge"
    export_bundle(recommender(), path, name="recommender", inputs=[((1,), "int64")], loss="mse", personal=[PERSONAL])
    sections = {
        "federation": {"name": "ratings", "bundle": str(path), "state": str(tmp_path / "state")},
        "round": {"cohort": USERS},
        "transfer": {"spread": 0.0},
        "train": {"epochs": 3, "batch_size": 8, "hypers": {"lr": 0.5}},
        "personal": {"head_epochs": 3},
        "server": {"learning_rate": 2.0},
        "evaluation": {"clients": USERS, "every": 8},
        "stop": {"rounds": 8},
        "simulation": {
            "clients": USERS,
            "data": "export.models.ratings:tastes",
            "split": "natural",
            "holdout": HOLDOUT,
        },
    }
    run = simulate(msgspec.convert(sections, Federation), lambda line: None)
    result = asyncio.run(asyncio.wait_for(run, 120))
    reached = result.rounds[-1].metrics["personal_loss"] ** 0.5
    overall, by_item = baselines()
    assert overall > by_item > 0.7
    assert reached < 0.85 * by_item, (reached, by_item)
    bundle = Bundle.open(path)
    assert {tensor.name for tensor in bundle.kept.tensors} == {"user.vector", "user.bias"}
    phones = list((tmp_path / "state" / "phones").glob("phone-*/memory-layers-*.bin"))
    assert len(phones) == USERS
    here = b"".join(one.read_bytes() for one in (tmp_path / "state").glob("ledger.db*"))
    for phone in phones:
        vector = bundle.kept.views(unpack_vector(phone.read_bytes(), bundle.kept))["user.vector"]
        assert np.abs(vector).max() > 0.1
        assert vector.tobytes() not in here
