"""Which clients are asked: a pure choice, repeatable from its seed."""

import random
from collections.abc import Sequence

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    """A client as the selection sees it."""

    id: str
    samples: int = 0
    available: bool = True
    last_round: int = -1
    """The last round it was asked in; -1 when it never was."""


def select(candidates: Sequence[Candidate], count: int, rng: random.Random) -> list[str]:
    """Draw at most ``count`` ids, uniformly and without replacement, among the available candidates.

    The order of ``candidates`` does not matter, only who is among them: the same ``rng`` state chooses the same ids.
    Only ``rng.random()`` is drawn from, the one method whose sequence Python keeps from release to release.
    """
    pool = sorted(candidate.id for candidate in candidates if candidate.available)
    chosen = max(0, min(count, len(pool)))
    for place in range(chosen):
        other = place + int(rng.random() * (len(pool) - place))
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:chosen]
