"""Virtual time: an event loop whose clock jumps to the next thing that happens, and a wall clock that may be wrong.

The drivers that ship run on it unchanged: they read the loop's clock, sleep on it and set timers on it. Nothing waits
for the machine, and nothing depends on it, so that equal seeds give equal runs.
"""

import asyncio
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from edge_client.errors import FedgeError, WireError
from edge_client.wire import messages as m

EPOCH = 1_800_000_000.0
"""Wall time at which every run begins, seconds since 1970."""


class Violation(Exception):  # noqa: N818
    """An invariant does not hold."""


class PowerCut(BaseException):
    """What ends a node in the middle of whatever it does; no `except Exception` of the code under test stops it."""


class _Nothing:
    """The loop's selector: no sockets, so waiting is turning the clock."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop
        self._spins = 0

    def select(self, timeout: float | None) -> list[Any]:
        self._spins = self._spins + 1 if timeout == 0 else 0
        if self._spins > 100_000:
            raise Violation(f"things happen for ever at {self._loop.now:.3f} s: a node spins")
        if timeout is None:
            raise Violation("nothing will ever happen again, and the run is not over")
        self._loop.now += timeout
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._selector = _Nothing(self)
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


@dataclass
class World:
    """What all nodes of one run share: the clock, the dice, the trace, and what was done to them."""

    seed: int
    keep_trace: bool = False
    loop: VirtualLoop = field(default_factory=VirtualLoop)
    rng: random.Random = field(init=False)
    wall_offset: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    """Faults that struck, by kind."""
    trace: list[str] = field(default_factory=list)
    digest: int = 0
    """A running checksum of everything that was noted: equal runs have equal ones."""
    violation: BaseException | None = None
    over: bool = False
    _jobs: set[asyncio.Task[Any]] = field(default_factory=set)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/world")
        self.loop.set_exception_handler(self._unexpected)
        self.loop.set_task_factory(self._kept)

    @property
    def now(self) -> float:
        return self.loop.now

    def wall(self) -> float:
        """What a clock on the wall shows."""
        return EPOCH + self.loop.now + self.wall_offset

    def note(self, who: str, what: str) -> None:
        """Write one line into the trace."""
        if self.over:
            return
        line = f"{self.loop.now:11.4f} {who:8} {what}"
        self.digest = zlib.crc32(line.encode(), self.digest)
        if self.keep_trace:
            self.trace.append(line)

    def said(self, who: str, topic: str, payload: bytes) -> None:
        """Note a message that a node publishes."""
        if self.over:
            return
        self.digest = zlib.crc32(payload, self.digest)
        if self.keep_trace:
            self.trace.append(f"{self.loop.now:11.4f} {who:8} -> {topic.split('/', 2)[-1][:40]} {_shown(payload)}")

    def strike(self, kind: str, who: str, detail: str = "") -> None:
        """Count a fault that struck."""
        self.faults[kind] += 1
        self.note(who, f"!! {kind} {detail}")

    def fail(self, violation: BaseException) -> None:
        """Remember the first violation; the run ends with it."""
        if self.violation is None:
            self.violation = violation
            self.note("oracle", f"VIOLATION {violation!r}")

    def violated(self, text: str) -> None:
        """Raise, and remember in case that the code under test swallows it."""
        violation = Violation(f"at {self.loop.now:.3f} s: {text}")
        self.fail(violation)
        raise violation

    def later(self, delay: float, call: Callable[..., object], *arguments: object) -> asyncio.TimerHandle:
        return self.loop.call_at(self.loop.now + delay, call, *arguments)

    def spawn(self, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine of the simulator; its failure is the run's."""
        task = self.loop.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._done)
        return task

    def _kept(self, loop: asyncio.AbstractEventLoop, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that lives until the run ends: nobody holds those of a dead life, and when they go would be chance."""
        task = asyncio.Task(job, loop=loop)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, PowerCut):
            self.fail(error)

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # What a dead life never looked at may be an error that ended it.
        if not isinstance(error, PowerCut | asyncio.CancelledError | FedgeError):
            self.fail(error if error is not None else Violation(context["message"]))

    def run(self, until: Callable[[], bool]) -> None:
        """Let things happen until ``until`` holds or an invariant does not."""

        async def watch() -> None:
            # What is waited for is what is true of the world, and no single event makes it so.
            while not until() and self.violation is None:  # noqa: ASYNC110
                await asyncio.sleep(1.0)

        self.loop.run_until_complete(watch())

    def close(self) -> None:
        """End every task that is left, in any order: that is no part of the run."""
        self.over = True
        loop = self.loop
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            task.cancel()
        with suppress(Violation):
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _shown(payload: bytes) -> str:
    try:
        message = m.decode(payload)
    except WireError:
        return f"{len(payload)} bytes"
    names = ("epoch", "task", "status", "version", "held", "kind", "indices")
    facts = [f"{name}={getattr(message, name)}" for name in names if hasattr(message, name)]
    return " ".join([type(message).__name__, *facts])


class WallClock:
    """The ``time`` module as code under test sees it."""

    def __init__(self, world: World) -> None:
        self._world = world

    def time(self) -> float:
        return self._world.wall()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
