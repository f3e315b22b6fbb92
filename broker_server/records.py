"""What the ledger remembers: tasks, versions of the model, rounds, and what clients did wrong."""

from typing import Literal

import msgspec


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a cohort; (epoch, task) is its identity."""

    epoch: int
    task: int
    round: int
    kind: Literal["train", "evaluate"]
    version: int
    """The model version that the cohort works on."""
    cohort: tuple[str, ...]
    plan: bytes
    opened: float
    """Wall-clock seconds since 1970."""

    @property
    def makes(self) -> int:
        """The version that its settings are of, at least 1: the one that training leads to, or that is evaluated.

        Rounds in service, which only evaluate, make none.
        """
        return self.version + 1 if self.kind == "train" else max(1, self.version)


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One published global model."""

    version: int
    round: int
    """The round that made it; 0 for the untrained model."""
    state: bytes
    """The packed model; empty once pruned."""
    remainder: bytes = b""
    """What coding left over."""
    optimizer: bytes = b""
    """The server optimizer's packed state."""
    pace: float = 0.0
    """Standard deviation of the steps that led here, averaged; the step of coding follows it."""
    anchor: int = 0
    """The version whose codes this one continues; 0 for the bundle's weights."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one round did; metrics may come later."""

    round: int
    version: int
    clients: int
    samples: int
    seconds: float
    bytes_up: int
    bytes_down: int
    metrics: dict[str, float] = {}


class Misconduct(msgspec.Struct, frozen=True):
    """What a client did wrong, and what followed."""

    time: float
    """Wall-clock seconds since 1970."""
    client: str
    kind: Literal["muted", "twin"]
    reason: str
    seconds: float
    """How long it was not listened to."""
