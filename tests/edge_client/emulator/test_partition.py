import itertools

import numpy as np
import pytest

from edge_client.emulator.partition import partition
from edge_client.errors import DataError

CLASSES = 10
LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES), 200))


def mixture(parts, labels=LABELS):
    return np.stack([np.bincount(labels[part], minlength=CLASSES) / len(part) for part in parts])


@pytest.mark.parametrize(
    ("split", "settings"),
    [
        ("iid", {}),
        ("dirichlet", {"alpha": 0.05}),
        ("dirichlet", {"alpha": 0.3}),
        ("dirichlet", {"alpha": 1e4}),
        ("shards", {"shards": 2}),
        ("natural", {"users": LABELS * 4 + np.arange(len(LABELS)) % 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("clients", [1, 7, 40])
def test_every_sample_is_used_exactly_once(split, settings, clients):
    if split == "natural":
        clients = len(np.unique(settings["users"]))
    parts = partition(LABELS, clients, split, seed=3, **settings)
    assert len(parts) == clients
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    if split in ("iid", "dirichlet"):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("split", ["iid", "dirichlet", "shards", "natural"])
def test_a_seed_decides_the_split(split):
    users = np.arange(len(LABELS)) % 80
    first, again, other = (partition(LABELS, 20, split, users=users, seed=seed) for seed in (5, 5, 6))
    assert all(itertools.starmap(np.array_equal, zip(first, again, strict=True)))
    assert not all(itertools.starmap(np.array_equal, zip(first, other, strict=True)))


def test_one_sample_a_client_is_enough():
    for split in ("iid", "dirichlet", "shards"):
        parts = partition(LABELS[:30], 30, split, alpha=0.01, shards=1, seed=0)
        assert [len(part) for part in parts] == [1] * 30


def test_alpha_sets_the_skew():
    top = [
        mixture(partition(LABELS, 40, "dirichlet", alpha=alpha, seed=0)).max(axis=1).mean()
        for alpha in (0.05, 0.5, 1e5)
    ]
    assert top[0] > 0.7 > top[1] > 0.3 > top[2]


def test_shards_limit_the_classes_of_a_client():
    parts = partition(LABELS, 20, "shards", shards=2, seed=0)
    # 40 shards of 50 samples from classes of 200: a shard never straddles two classes.
    assert all(len(part) == 100 and len(np.unique(LABELS[part])) <= 2 for part in parts)


def test_natural_gives_each_user_to_one_client():
    users = np.array(["eve", "bob", "eve", "ann", "bob", "eve"])
    parts = partition(np.zeros(6, np.int64), 3, "natural", users=users)
    assert [part.tolist() for part in parts] == [[3], [1, 4], [0, 2, 5]]


def test_natural_draws_whole_users_when_clients_are_fewer():
    users = np.repeat(np.arange(50), 4)
    parts = partition(np.zeros((200, 8)), 10, "natural", users=users, seed=2)
    chosen = [np.unique(users[part]) for part in parts]
    assert all(len(user) == 1 and len(part) == 4 for user, part in zip(chosen, parts, strict=True))
    assert len(np.unique(np.concatenate(chosen))) == 10


@pytest.mark.parametrize(
    ("clients", "split", "settings", "message"),
    [
        (0, "iid", {}, "at least 1 client"),
        (2001, "iid", {}, "2000 samples cannot be split over 2001 clients"),
        (10, "dirichlet", {"alpha": 0.0}, "alpha is 0.0; expected a positive number"),
        (10, "dirichlet", {"alpha": float("nan")}, "alpha is nan"),
        (10, "shards", {"shards": 201}, "expected 1 to 200 shards"),
        (10, "shards", {"shards": 0}, "expected 1 to 200 shards"),
        (10, "natural", {}, "needs the user of each sample"),
        (10, "natural", {"users": np.arange(3)}, r"users has shape \[3\]; expected \[2000\]"),
        (10, "natural", {"users": LABELS % 4}, "the data has 4 users; 10 clients"),
        (10, "uniform", {}, "split 'uniform' is unknown; expected one of iid, dirichlet, shards, natural"),
    ],
)
def test_what_cannot_be_split_is_refused(clients, split, settings, message):
    with pytest.raises(DataError, match=message):
        partition(LABELS, clients, split, **settings)


@pytest.mark.parametrize("labels", [np.zeros((20, 5), np.int64), np.zeros(20, np.float32)], ids=["tokens", "floats"])
def test_splits_by_label_need_one_class_a_sample(labels):
    with pytest.raises(DataError, match="use iid or natural"):
        partition(labels, 4, "dirichlet")
    assert len(partition(labels, 4, "iid")) == 4
