"""A model in service: nobody trains, and clients evaluate the newest version once, or again and again.

It goes on from the ledger of a federation that has finished, or that has been interrupted. What it finds becomes rounds
that no client has trained in; they count towards no stop condition of training.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from broker_server import events as e
from broker_server.coordinator import Coordinator
from broker_server.tally import Tally


@dataclass
class Inspector(Coordinator):
    """One federation that only evaluates."""

    _next: float = field(init=False, default=0.0)
    """When the next evaluation begins; 0 is as soon as clients are there."""
    _evaluated: bool = field(init=False, default=False)

    @property
    def wake(self) -> float | None:
        """When the next Tick is due, on the clock of ``now``."""
        due = self._next if self.phase == "waiting" and self._connected and self._next else None
        return min((time for time in (super().wake, due) if time is not None), default=None)

    def _tick(self, now: float) -> Iterator[e.Action]:
        if now >= self._next:
            self._next = 0.0
        yield from super()._tick(now)

    def _consider(self, now: float) -> Iterator[e.Action]:
        if self.phase != "waiting":
            yield from super()._consider(now)
        elif self._connected and now >= self._next:
            if self._evaluated and not self.settings.evaluation.period:
                yield from self._stop(f"version {self._version} is evaluated", now)
            elif self._roster.present() >= self._wanted:
                yield from self._inspect(now)

    @property
    def _wanted(self) -> int:
        """Clients without whom it does not begin: all that are asked, while more are still expected to come."""
        asked = self.settings.evaluation.clients
        if not asked:
            return 0
        young = bool(self._gather) or not (self._evaluated or self.restored.rounds)
        return (self.settings.round.clients or asked) if young else 1

    def _inspect(self, now: float) -> Iterator[e.Action]:
        self._next = now + self.settings.evaluation.period
        # The time since the last one is not what this one takes.
        self._round = replace(self._round, began=now)
        self._round.trained(Tally(), self._version)
        self.phase = "measure"
        if self.settings.evaluation.data:
            yield e.Evaluate(self._version)
        else:
            yield from self._ask_clients(now)

    def _finish(self, now: float) -> Iterator[e.Action]:
        self._evaluated = True
        yield from super()._finish(now)
