"""Schedules of the server's learning rate: a factor for each step, from how many were made before."""

import math
from collections.abc import Callable
from typing import Literal

Kind = Literal["constant", "step", "exponential", "linear", "cosine"]
SPANNING = ("linear", "cosine")
"""Those that end after a number of rounds."""


def schedule(
    kind: Kind, *, warmup: int = 0, factor: float = 0.5, every: int = 10, rounds: int = 0, least: float = 0.0
) -> Callable[[int], float]:
    """What the learning rate is multiplied with, by the number of steps made before.

    It rises in ``warmup`` equal steps to 1, and then, ``t`` steps later, is

    ===========  =============================================================
    constant     1
    step         ``factor^floor(t / every)``
    exponential  ``factor^(t / every)``
    linear       falls to ``least`` at step ``rounds``, and stays there
    cosine       the same along half a cosine (Loshchilov and Hutter 2017)
    ===========  =============================================================
    """

    def found(count: int) -> float:
        if count < warmup:
            return (count + 1) / (warmup + 1)
        after = count - warmup
        gone = min(1.0, after / max(1, rounds - warmup))
        match kind:
            case "constant":
                return 1.0
            case "step":
                return float(factor ** (after // every))
            case "exponential":
                return float(factor ** (after / every))
            case "linear":
                return least + (1 - least) * (1 - gone)
            case "cosine":
                return least + (1 - least) * (1 + math.cos(math.pi * gone)) / 2

    return found
