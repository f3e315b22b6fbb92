"""What attackers do to a federation: to their labels before they train, or to their updates before they send them.

An attack on updates is a function ``attack(own, clients)``: of what the attackers would send if they were honest
(``[attackers, n] float32``; they know each other's) and how many clients there are in all, to what they do send.
"""

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
Attack = Callable[[Rows, int], Rows]


def label_flip(labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
    """Class ``c`` is called ``classes - 1 - c`` (Fang et al. 2020, "Local model poisoning attacks")."""
    return classes - 1 - labels


def sign_flip(factor: float = 1.0) -> Attack:
    """Away from where the model should go, so many times as far."""
    return lambda own, clients: np.float32(-factor) * own


def scaled(factor: float) -> Attack:
    """Where the model should go, so many times as far: what replaces a model (Bagdasaryan et al. 2020)."""
    return lambda own, clients: np.float32(factor) * own


def little_is_enough(own: Rows, clients: int) -> Rows:
    """All of them the mean less ``z`` standard deviations, each element by itself (Baruch et al. 2019).

    ``z`` is the largest for which enough honest clients are expected to lie farther out, so that a majority stands with
    the attackers: ``Phi(z) = (n - m - s) / (n - m)`` with ``s = floor(n / 2 + 1) - m`` of ``n`` clients, ``m`` of them
    attackers. Mean and deviation are estimated from what the attackers have.
    """
    attackers = len(own)
    honest = clients - attackers
    needed = clients // 2 + 1 - attackers
    z = NormalDist().inv_cdf((honest - needed) / honest)
    crafted = own.mean(axis=0, dtype=np.float64) - z * own.std(axis=0, dtype=np.float64)
    return np.tile(crafted.astype(np.float32), (attackers, 1))


ATTACKS: Mapping[str, Attack] = {
    "sign flip": sign_flip(10.0),
    "scaled": scaled(100.0),
    "little is enough": little_is_enough,
}


def attacked(updates: Rows, attackers: int, attack: Attack) -> Rows:
    """The updates of a round (``[clients, n]``) of which the first ones are attackers'."""
    return np.concatenate([attack(updates[:attackers], len(updates)), updates[attackers:]])
