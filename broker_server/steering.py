"""What the care for a fleet and the coordinator tell each other: events and actions that are about no training."""

from dataclasses import dataclass

from edge_client.wire.messages import BlobRef, Hello, Message

# Events.


@dataclass(frozen=True)
class Steered:
    """What the operator wants of the fleet has changed, or is known at the start."""

    paused: frozenset[str] = frozenset()
    """Clients of which no work is asked."""
    everyone: bool = False
    """Whether no work is asked of anybody."""
    files: tuple[tuple[BlobRef, str], ...] = ()
    """Blobs that are to be retained, in files by their paths."""

    def pauses(self, client: str) -> bool:
        """Whether no work is asked of a client."""
        return self.everyone or client in self.paused


@dataclass(frozen=True)
class Say:
    """A message to a client that has nothing to do with training."""

    client: str
    message: Message


# Actions.


@dataclass(frozen=True)
class Seen:
    """A client has said how it is."""

    client: str
    hello: Hello


@dataclass(frozen=True)
class Adopt:
    """Take a file for a blob that may be published."""

    ref: BlobRef
    path: str
