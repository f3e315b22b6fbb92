"""A phone's radio: what it sends and receives takes time."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_client.emulator.profile import PhoneProfile
from edge_client.transport import Handler, Link
from edge_client.wire.messages import Traffic


@dataclass
class _Lane:
    """One direction of a radio: messages keep their order, and each waits for the bytes before it."""

    profile: PhoneProfile
    free: float = 0.0
    due: float = 0.0
    queue: deque[Callable[[], None]] = field(default_factory=deque)

    def send(self, size: int, deliver: Callable[[], None]) -> None:
        if not self.profile.bandwidth and not self.profile.latency:
            deliver()
            return
        loop = asyncio.get_running_loop()
        self.free = max(self.free, loop.time()) + self.profile.transfer_seconds(size) - self.profile.latency
        self.due = max(self.due, self.free + self.profile.latency)
        # Timers that are due at once fire in any order, so each takes the oldest message and not its own.
        self.queue.append(deliver)
        loop.call_at(self.due, lambda: self.queue.popleft()())


@dataclass
class RadioLink:
    """A link with the bandwidth and latency of a profile, in each direction on its own.

    What is under way when the connection is lost is lost with it.
    """

    inner: Link
    profile: PhoneProfile
    _up: _Lane = field(init=False)
    _down: _Lane = field(init=False)
    _life: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._up, self._down = _Lane(self.profile), _Lane(self.profile)

    @property
    def traffic(self) -> Traffic:
        """Bytes counted by the link underneath."""
        return self.inner.traffic

    @property
    def settled(self) -> bool:
        """Whether nothing waits for the radio, and the broker has acknowledged the rest."""
        return not self._up.queue and self.inner.settled

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send a message once the radio is free."""
        self._later(self._up, len(payload), lambda: self.inner.publish(topic, payload, retain=retain))

    def subscribe(self, topics: tuple[str, ...]) -> None:
        """Subscribe once the radio is free."""
        self._later(self._up, sum(map(len, topics)), lambda: self.inner.subscribe(topics))

    def unsubscribe(self, topics: tuple[str, ...]) -> None:
        """Unsubscribe once the radio is free."""
        self._later(self._up, sum(map(len, topics)), lambda: self.inner.unsubscribe(topics))

    async def run(self, handler: Handler) -> None:
        """Run the link underneath, with arrivals delayed."""
        await self.inner.run(_Delayed(self, handler))

    def drop(self) -> None:
        """Let the connection fall without a word."""
        self.reset()
        self.inner.drop()

    async def close(self) -> None:
        """Send what is under way, for at most two seconds, disconnect and end `run`."""
        await asyncio.sleep(min(2.0, max(0.0, self._up.due - asyncio.get_running_loop().time())))
        await self.inner.close()

    def arrive(self, size: int, deliver: Callable[[], None]) -> None:
        """Hand over an arrival of ``size`` bytes once the radio has taken it in."""
        self._later(self._down, size, deliver)

    def reset(self) -> None:
        """The connection is gone, and what was under way with it."""
        self._life += 1
        self._up, self._down = _Lane(self.profile), _Lane(self.profile)

    def _later(self, lane: _Lane, size: int, act: Callable[[], None]) -> None:
        life = self._life
        lane.send(size, lambda: act() if life == self._life else None)


@dataclass
class _Delayed:
    link: RadioLink
    handler: Handler

    def connected(self) -> None:
        self.handler.connected()

    def disconnected(self, reason: str) -> None:
        self.link.reset()
        self.handler.disconnected(reason)

    def message(self, topic: str, payload: bytes) -> None:
        self.link.arrive(len(payload), lambda: self.handler.message(topic, payload))
