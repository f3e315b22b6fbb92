"""When a client says hello: with news, again until the server shows a sign of having heard it, and by heartbeat."""

import random
from dataclasses import dataclass

from edge_client.upload import Patience

_AGAIN = 6
"""Times that a hello is said again without a sign; a server that has no use for the client gives none."""
_SPREADS = 10.0
"""Times the spread of a fleet's answers before one is said again: such hellos are a tenth of what the answers were."""


@dataclass
class Greeting:
    """One client's hellos; times are monotonic seconds.

    A broker whose queue is full loses a hello and acknowledges it, and a server does not believe one by a device that
    was enrolled a moment ago: nothing would be asked of the client until its next heartbeat.
    """

    patience: Patience
    rng: random.Random
    at: float | None = None
    """When the next one is due; None where there is nobody to greet."""
    _beat: float | None = None
    """When it would be due if the last one was heard; None where nobody waits for a sign."""
    _attempts: int = 0

    def plan(self, at: float | None) -> None:
        """There is news, to be said then; with None there is nobody to say it to."""
        self.at, self._beat, self._attempts = at, None, 0

    def said(self, now: float, heartbeat: float, spread: float) -> None:
        """It is said now; the offer gives ``heartbeat`` and ``spread``, in seconds."""
        self.at = now + heartbeat * self.rng.uniform(0.75, 1.25)
        if self._attempts == _AGAIN:
            self._beat = None
            return
        # The answers of a very large fleet are spread over so long that its heartbeats come sooner.
        self._beat, again = self.at, now + _SPREADS * spread + self.patience.after(self._attempts)
        self.at = min(self._beat, again)
        self._attempts += 1

    def heard(self) -> None:
        """The server has said something to this client."""
        if self._beat is not None:
            self.at, self._beat, self._attempts = self._beat, None, _AGAIN
