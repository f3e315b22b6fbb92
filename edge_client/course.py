"""The course of a task: how many steps it has, how long it may take, and how its learning rate falls on the way."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

from edge_client.wire.messages import TrainPlan

Clock = Callable[[], float]


@dataclass
class Course:
    """From a task's first step to its last. It begins when it is made.

    With ``p`` the share of the task that is done, by its steps or by its time, whichever is further, the learning rate
    of the next step is multiplied by

    ========  ===================================================
    constant  1
    linear    ``1 - p``
    cosine    ``(1 + cos(pi p)) / 2`` (Loshchilov and Hutter 2017)
    ========  ===================================================

    so that all steps count, and the first is made at the full rate.
    """

    steps: int
    """Planned, at least 1."""
    seconds: float = 0.0
    """It ends with the first step after so many; 0 is no bound."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    clock: Clock = time.perf_counter
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @classmethod
    def of(cls, plan: TrainPlan, samples: int, clock: Clock = time.perf_counter) -> Self:
        """As ``plan`` says, on so many samples."""
        steps = plan.steps or plan.epochs * -(-samples // plan.batch_size)
        return cls(max(1, steps), plan.seconds, plan.schedule, clock)

    def elapsed(self) -> float:
        """Seconds since it began."""
        return self.clock() - self._started

    def factor(self, done: int) -> float:
        """What the learning rate of the next step is multiplied by, after ``done`` steps."""
        if self.schedule == "constant" or not done:
            return 1.0  # the first batch may have taken a while
        gone = max(done / self.steps, self.elapsed() / self.seconds if self.seconds else 0.0)
        gone = min(1.0, gone)
        return 1.0 - gone if self.schedule == "linear" else (1.0 + math.cos(math.pi * gone)) / 2.0

    def over(self) -> bool:
        """Whether its time is up."""
        return self.seconds > 0 and self.elapsed() >= self.seconds

    def closing(self, done: int) -> bool:
        """Whether its time is likely to be up with the next step, from how long the ``done`` ones took."""
        return self.seconds > 0 and self.elapsed() * (done + 1) >= self.seconds * done
