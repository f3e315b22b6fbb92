"""Clients that are not listened to, told to the broker: what it does not take, it does not queue for the server either.

A client that floods fills the server's queue at the broker, and a full one loses what the others say. Dropping its
messages as they arrive is too late for that.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edge_client.errors import FedgeError

_MOST = 1000
"""Clients that the broker is told of at once; further ones are dropped as they arrive."""


@dataclass
class Hush:
    """Tells the broker who is muted, one change after the other, in another thread.

    ``tell`` is handed everyone who is muted now, by name; ``log`` why it could not be done.
    """

    tell: Callable[[tuple[str, ...]], None]
    log: Callable[[str], None]
    _until: dict[str, float] = field(init=False, default_factory=dict)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def mute(self, client: str, seconds: float) -> None:
        """A client is not listened to for so long from now on."""
        if client in self._until or len(self._until) < _MOST:
            self._until[client] = asyncio.get_running_loop().time() + seconds
            self._changed.set()

    def lift(self, clients: Iterable[str]) -> None:
        """Names that belong to another key now, or to nobody: what was said with the one before is forgiven."""
        for client in clients:
            if self._until.pop(client, None) is not None:
                self._changed.set()

    async def run(self) -> None:
        """Tell until cancelled; nobody is muted at first, whatever an earlier server has told."""
        loop, told = asyncio.get_running_loop(), None
        while True:
            self._changed.clear()
            now = loop.time()
            self._until = {client: end for client, end in self._until.items() if end > now}
            muted = tuple(sorted(self._until))
            if muted != told:
                try:
                    await asyncio.to_thread(self.tell, muted)
                except FedgeError as error:
                    self.log(f"the broker cannot be told who is not listened to: {error}")
                told = muted
            first = min(self._until.values(), default=None)
            try:
                await asyncio.wait_for(self._changed.wait(), None if first is None else first - loop.time())
            except TimeoutError:
                continue
