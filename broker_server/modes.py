"""Which state machine serves a federation, by its ``round.mode``."""

from broker_server.asynchronous import AsynchronousCoordinator
from broker_server.config import Federation
from broker_server.conversation import Conversation
from broker_server.coordinator import Coordinator
from broker_server.events import Restored
from broker_server.inspector import Inspector
from edge_client.wire.voice import Host, PlainHost

_KINDS: dict[str, type[Conversation]] = {
    "synchronous": Coordinator,
    "buffered": AsynchronousCoordinator,
    "evaluation": Inspector,
}


def coordinator(settings: Federation, restored: Restored, voice: Host | None = None) -> Conversation:
    """The state machine of the mode that the settings name."""
    return _KINDS[settings.round.mode](settings, restored, voice or PlainHost())
