"""One round under way: when it began, what its tasks came to, and the bytes that it took."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from broker_server.metrics import ANSWERS
from broker_server.records import Round
from broker_server.tally import Tally


@dataclass
class OpenRound:
    """A round from its first task to its result.

    ``began`` is on the coordinator's clock; ``up`` and ``down`` are the bytes that were counted before it; ``result``
    is there once its model is.
    """

    number: int
    began: float | None = None
    up: int = 0
    down: int = 0
    result: Round | None = None

    def begin(self, now: float) -> None:
        """Its time runs, where it does not yet."""
        if self.began is None:
            self.began = now

    def trained(self, tally: Tally, version: int) -> Round:
        """Training is over, and makes this version."""
        self.result = Round(
            round=self.number,
            version=version,
            clients=tally.results,
            samples=tally.samples,
            seconds=0.0,
            bytes_up=0,
            bytes_down=0,
            metrics=tally.metrics("train_") | tally.fairness("train_"),
        )
        return self.result

    def measured(self, metrics: Mapping[str, float]) -> None:
        """The server has evaluated its model."""
        if self.result is not None:
            self.result = msgspec.structs.replace(self.result, metrics={**self.result.metrics, **metrics})

    def tested(self, tally: Tally) -> None:
        """Clients have evaluated its model; where the server has not, theirs are its metrics."""
        if self.result is not None:
            told = tally.metrics("client_") | tally.fairness("client_")
            metrics = {**tally.metrics(""), **self.result.metrics, **told, ANSWERS: float(tally.results)}
            self.result = msgspec.structs.replace(self.result, metrics=metrics)

    def finished(self, up: int, down: int, now: float) -> Round | None:
        """What it came to, from what is counted by now; None when it made no model."""
        if self.result is None:
            return None
        seconds = now - self.began if self.began is not None else 0.0
        return msgspec.structs.replace(self.result, seconds=seconds, bytes_up=up - self.up, bytes_down=down - self.down)
