"""Step times inside a contender's process: the same clock, warm-up and ending for all. It imports nothing heavy."""

import statistics
import time


class Stopwatch:
    """Asked before each step whether it is over; what lies between two questions is one step.

    Over after ``seconds`` of timed steps (at least ten), or after ``steps`` steps where that is not zero.
    """

    def __init__(self, seconds: float, steps: int = 0, *, warmup_steps: int = 5) -> None:
        self._seconds = seconds
        self._steps = steps
        self._warmup = 0 if steps else warmup_steps
        self._marks: list[float] = []

    def over(self) -> bool:
        # The monotonic clock is one for all processes, so that a parent can subtract the time of the start.
        now = time.monotonic()
        self._marks.append(now)
        done = len(self._marks) - 1
        if self._steps:
            return done >= self._steps
        # First steps are slow: allocators grow, caches fill. A fifth of the time is theirs.
        return done >= self._warmup + 10 and now - self._marks[0] >= 1.2 * self._seconds

    def report(self) -> dict[str, float]:
        """``step_ms`` (the median), ``steps`` (timed ones), ``finished`` (when the last one was)."""
        times = [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        skipped = self._warmup
        while skipped < len(times) - 10 and self._marks[skipped] - self._marks[0] < 0.2 * self._seconds:
            skipped += 1
        timed = times if self._steps else times[skipped:]
        return {"step_ms": statistics.median(timed) * 1e3, "steps": len(timed), "finished": self._marks[-1]}
