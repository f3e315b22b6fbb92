"""Ratings to try a recommender on: drawn from a known model of users and items, as no data set comes with fedge."""

import numpy as np
import numpy.typing as npt

USERS, ITEMS, EACH, RANK = 30, 40, 36, 2
"""Users, items, ratings of each user, and how many tastes they differ in."""
MIDDLE, USER_BIAS, ITEM_BIAS, TASTE, NOISE = 3.3, 0.3, 0.4, 0.8, 0.25
"""Mean rating, and standard deviations of what makes one differ from it."""


def tastes(seed: int = 0) -> dict[str, npt.NDArray[np.generic]]:
    """``x`` (``[n, 1] int64``: the item), ``y`` (``[n, 1] float32``: half stars from 0.5 to 5) and ``user`` (``[n]``).

    A rating is the mean, a bias of its user and one of its item, what the two have in common in two tastes, and noise;
    items are rated by chance, all of them as often as any other. That is simpler than people are: what is learned here
    says that the method works, and nothing of how well it does on real ratings.
    """
    rng = np.random.default_rng(seed)
    of_users, of_items = rng.normal(size=(USERS, RANK)), rng.normal(size=(ITEMS, RANK))
    bias_users, bias_items = rng.normal(0, USER_BIAS, USERS), rng.normal(0, ITEM_BIAS, ITEMS)
    user = np.repeat(np.arange(USERS), EACH)
    item = np.concatenate([rng.choice(ITEMS, EACH, replace=False) for _ in range(USERS)])
    common = (of_users[user] * of_items[item]).sum(1) * (TASTE / RANK**0.5)
    exact = MIDDLE + bias_users[user] + bias_items[item] + common + rng.normal(0, NOISE, len(user))
    stars = np.clip(np.rint(2 * exact) / 2, 0.5, 5.0).astype(np.float32)
    return {"x": item[:, None].astype(np.int64), "y": stars[:, None], "user": user.astype(np.int64)}
