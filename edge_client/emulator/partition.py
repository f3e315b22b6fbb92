"""Who holds which samples: splits of one data set over emulated phones.

Every split is a pure function of its arguments: the same seed gives the same phones.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_client.errors import DataError

Split = Literal["iid", "dirichlet", "shards", "natural"]
Indices = npt.NDArray[np.int64]
Labels = npt.NDArray[np.generic]


def partition(
    labels: Labels,
    clients: int,
    split: Split,
    *,
    alpha: float = 0.3,
    shards: int = 2,
    users: Labels | None = None,
    seed: int = 0,
) -> list[Indices]:
    """Sample indices of each client, ascending: disjoint, none empty.

    Args:
        labels: the target of each sample, ``[n]`` integers for ``dirichlet`` and ``shards``; the others use its length.
        clients: how many clients share the samples.
        split: ``iid`` (equal random parts), ``dirichlet`` (see `dirichlet`), ``shards`` (see `shard`) or ``natural``
            (one client for each user, see `natural`).
        alpha: concentration of the Dirichlet distribution, above 0; small means that a client sees few classes.
        shards: label-sorted shards for each client.
        users: the user of each sample, ``[n]``; needed for ``natural``.
        seed: decides every draw.

    Returns:
        ``clients`` arrays ``[n_k] int64``. Every sample is used exactly once, but that ``natural`` leaves out the users
        for whom there is no client.

    Raises:
        DataError: the samples cannot be split so.
    """
    if not 1 <= clients <= len(labels):
        raise DataError(
            f"{len(labels)} samples cannot be split over {clients} clients: each needs at least one; "
            "ask for at least 1 client and at most as many as there are samples"
        )
    rng = np.random.default_rng(seed)
    splits: dict[str, Callable[[], list[Indices]]] = {
        "iid": lambda: np.array_split(rng.permutation(len(labels)), clients),
        "dirichlet": lambda: dirichlet(_classes(labels), clients, alpha, rng),
        "shards": lambda: shard(_classes(labels), clients, shards, rng),
        "natural": lambda: natural(users, len(labels), clients, rng),
    }
    if split not in splits:
        raise DataError(f"split {split!r} is unknown; expected one of {', '.join(splits)}")
    return [np.sort(part).astype(np.int64, copy=False) for part in splits[split]()]


def dirichlet(labels: Indices, clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Equally many samples for each client, of classes in proportions that it draws from Dirichlet(alpha, ..., alpha).

    Samples are dealt without replacement; a class that runs out leaves a client's proportions, which then count
    among the classes that remain. Clients are dealt in random order, as the last ones take what is left over.
    Sizes differ by at most one sample.

    Reference: Hsu, Qi and Brown (2019), arXiv:1909.06335.

    Raises:
        DataError: alpha is not a positive number.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; expected a positive number, such as 0.3")
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    left = np.array([len(pool) for pool in pools])
    sizes = [len(part) for part in np.array_split(labels, clients)]
    parts: list[Indices] = [np.empty(0, np.int64)] * clients
    for client in rng.permutation(clients):
        proportions = rng.dirichlet(np.full(len(pools), alpha))
        taken: list[Indices] = []
        missing = sizes[client]
        while missing:
            share = np.where(left > 0, proportions, 0.0)
            # A small alpha can put all its mass on classes that ran out: then what is left decides.
            share = share / share.sum() if share.sum() > 1e-12 else left / left.sum()
            counts = np.minimum(rng.multinomial(missing, share), left)
            taken += [pools[label][left[label] - counts[label] : left[label]] for label in np.flatnonzero(counts)]
            left -= counts
            missing -= int(counts.sum())
        parts[client] = np.concatenate(taken)
    return parts


def shard(labels: Indices, clients: int, shards: int, rng: np.random.Generator) -> list[Indices]:
    """Sort by label, cut into ``clients * shards`` equal shards, deal ``shards`` of them to each client at random.

    Reference: McMahan et al. (2017), arXiv:1602.05629, section 3 (there 2 shards for each of 100 clients).

    Raises:
        DataError: there are fewer samples than shards.
    """
    if shards < 1 or clients * shards > len(labels):
        raise DataError(
            f"{len(labels)} samples cannot be cut into {clients} x {shards} shards; "
            f"expected 1 to {len(labels) // clients} shards for each of {clients} clients"
        )
    shuffled = rng.permutation(len(labels))
    ordered = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(ordered, clients * shards)
    dealt = rng.permutation(len(pieces)).reshape(clients, shards)
    return [np.concatenate([pieces[piece] for piece in row]) for row in dealt]


def natural(users: Labels | None, samples: int, clients: int, rng: np.random.Generator) -> list[Indices]:
    """One client for each user, in the order of the users' ids.

    With fewer clients than users, as many users are drawn at random: ids are often sorted by where users came from, so
    the first ones would not stand for the rest.

    Raises:
        DataError: no users are given, they do not fit the samples, or there are fewer users than clients.
    """
    if users is None:
        raise DataError("split 'natural' needs the user of each sample; name the array that holds it as the key")
    if users.shape != (samples,):
        raise DataError(f"users has shape {list(users.shape)}; expected [{samples}], one user for each sample")
    _, owner, counts = np.unique(users, return_inverse=True, return_counts=True)
    if clients > len(counts):
        raise DataError(f"the data has {len(counts)} users; {clients} clients need at least as many")
    chosen = np.sort(rng.choice(len(counts), clients, replace=False))
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(counts)
    return [order[ends[user] - counts[user] : ends[user]] for user in chosen]


def _classes(labels: Labels) -> Indices:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)}; a split by label expects integers [n]; use iid or natural"
        )
    return labels.astype(np.int64, copy=False)
