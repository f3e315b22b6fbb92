"""The topic grammar: build and parse.

=====================================  ==============================================================================
``fedge/<federation>/pub/offer``       the offer, retained
``fedge/<federation>/pub/<sha>/<i>``   chunk ``i`` of the blob with that SHA-256 (hex), retained
``fedge/<federation>/up/<id>/msg``     messages of client ``<id>``
``fedge/<federation>/up/<id>/<sha>/<i>``  chunk ``i`` of a blob that client ``<id>`` uploads
``fedge/<federation>/down/<id>/msg``   messages to client ``<id>``
=====================================  ==============================================================================

A client writes ``up/<its id>/#`` and reads ``down/<its id>/#`` and ``pub/#``: three access rules for a broker. No topic
has more than seven levels, which every broker that we know of takes.
"""

import re
from dataclasses import dataclass

from edge_client.errors import WireError

NAME = r"[A-Za-z0-9_-]{1,64}"
"""What a federation may be called, as a pattern."""
CLIENT = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}"
"""What a client may be called, as a pattern."""
_UP = re.compile(rf"^fedge/({NAME})/up/({CLIENT})/(?:msg|([0-9a-f]{{64}})/([0-9]{{1,9}}))\Z")
_WRITER = re.compile(rf"^fedge/({NAME})/up/({CLIENT})/")
_PUB = re.compile(rf"^fedge/({NAME})/pub/(?:offer|([0-9a-f]{{64}})/([0-9]{{1,9}}))\Z")


@dataclass(frozen=True)
class Chunk:
    """Which piece of which blob a topic carries."""

    sha256: bytes
    index: int


@dataclass(frozen=True)
class Topics:
    """All topics of one federation."""

    federation: str

    @property
    def offer(self) -> str:
        """Where the offer is retained."""
        return f"fedge/{self.federation}/pub/offer"

    @property
    def every_up(self) -> str:
        """The filter that matches everything any client writes."""
        return f"fedge/{self.federation}/up/#"

    def up(self, client: str) -> str:
        """Where ``client`` sends its messages."""
        return f"fedge/{self.federation}/up/{client}/msg"

    def down(self, client: str) -> str:
        """Where ``client`` receives its messages."""
        return f"fedge/{self.federation}/down/{client}/msg"

    def published(self, sha256: bytes, index: int) -> str:
        """Where a chunk of a published blob is retained."""
        return f"fedge/{self.federation}/pub/{sha256.hex()}/{index}"

    def uploaded(self, client: str, sha256: bytes, index: int) -> str:
        """Where ``client`` sends a chunk of its blob."""
        return f"fedge/{self.federation}/up/{client}/{sha256.hex()}/{index}"

    def writer(self, topic: str) -> str | None:
        """The client that alone may write to ``topic``, whatever else the topic says; None where it is nobody's."""
        found = _WRITER.match(topic)
        return found[2] if found is not None and found[1] == self.federation else None

    def parse_up(self, topic: str) -> tuple[str, Chunk | None]:
        """The client that wrote to ``topic``, and the chunk it carries (None for a message).

        Raises:
            WireError: the topic is not one that a client of this federation writes.
        """
        found = _UP.match(topic)
        if found is None or found[1] != self.federation:
            raise WireError(f"topic {topic[:200]!r} is not one that a client of {self.federation!r} writes")
        return found[2], _chunk(found[3], found[4])

    def parse_pub(self, topic: str) -> Chunk | None:
        """The chunk that a published ``topic`` carries, None for the offer.

        Raises:
            WireError: the topic is not one that the server of this federation publishes.
        """
        found = _PUB.match(topic)
        if found is None or found[1] != self.federation:
            raise WireError(f"topic {topic[:200]!r} is not one that the server of {self.federation!r} publishes")
        return _chunk(found[2], found[3])


def _chunk(sha256: str | None, index: str | None) -> Chunk | None:
    return None if sha256 is None or index is None else Chunk(bytes.fromhex(sha256), int(index))
