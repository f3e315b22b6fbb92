"""When a run is over: rounds, target, patience, time, bytes."""

from collections.abc import Iterable

from broker_server.config import Stop
from broker_server.records import Round


class Progress:
    """What the finished rounds add up to, against the stop conditions."""

    def __init__(self, stop: Stop, rounds: Iterable[Round] = ()) -> None:
        self._stop = stop
        self._seconds = 0.0
        self._bytes = 0
        self._best: float | None = None
        self._since = 0
        self._last: float | None = None
        self.rounds = 0
        for finished in rounds:
            self.add(finished)

    def add(self, finished: Round) -> bool:
        """Count a finished round; True when its model is the best so far (each one is while nothing is measured).

        One that nobody has trained in, an evaluation of a model in service, is none of training.
        """
        if not finished.clients:
            return False
        self.rounds += 1
        self._seconds += finished.seconds
        self._bytes += finished.bytes_up + finished.bytes_down
        self._last = finished.metrics.get(self._stop.metric)
        if self._last is None:
            return self._best is None
        if self._stop.better(self._last, self._best):
            self._best, self._since = self._last, 0
            return True
        self._since += 1
        return False

    def reason(self) -> str | None:
        """Why the run is over, None while it is not."""
        stop = self._stop
        if stop.target is not None and self._last is not None and stop.reached(self._last):
            return f"{stop.metric} {self._last:.4f} reaches the target {stop.target:g}"
        if stop.rounds and self.rounds >= stop.rounds:
            return f"{self.rounds} rounds are done"
        if stop.patience and self._since >= stop.patience:
            return f"{stop.metric} has not improved for {self._since} evaluations"
        if stop.seconds and self._seconds >= stop.seconds:
            return f"{self._seconds:.0f} s have passed"
        if stop.bytes and self._bytes >= stop.bytes:
            return f"{self._bytes} bytes have been sent"
        return None
