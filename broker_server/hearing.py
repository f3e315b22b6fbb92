"""How a server listens: to whom, how much, and what it believes. What follows from it is left to `Conversation`.

Messages are weighed before they are read: a muted client costs a look at its name, one that says too much is dropped
before its message is decoded, and nothing is done about a message that is not believed.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from broker_server import events as e
from broker_server.conduct import Conduct, Mute
from broker_server.config import Federation
from broker_server.roster import Roster
from edge_client.errors import TrustError, WireError
from edge_client.terminal import printable
from edge_client.wire import messages as m
from edge_client.wire.topics import Chunk, Topics
from edge_client.wire.voice import Host, PlainHost

HEARTBEAT = 300.0
"""Seconds between hellos of an idle client, give or take a quarter."""
_MISSED = 3.0
"""Heartbeats without a word after which a client is taken for dead: its last will may be lost."""


@dataclass
class Hearing(ABC):
    """What comes from the broker, up to what is made of it."""

    settings: Federation
    restored: e.Restored
    voice: Host = field(default_factory=PlainHost)
    """How it speaks to clients, and what it believes of what it hears."""
    dropped: int = 0
    """Messages that were malformed, foreign, too large, too many or not believed, and were dropped."""
    distrusted: int = 0
    """Those of them that were not believed."""
    _topics: Topics = field(init=False)
    _roster: Roster = field(init=False)
    _conduct: Conduct = field(init=False)

    def __post_init__(self) -> None:
        self._topics = Topics(self.settings.federation.name)
        self._conduct = Conduct(self.settings.limits, self.settings.transfer.window)
        self._roster = Roster(not self.restored.rounds, _MISSED * HEARTBEAT, dict(self.restored.voids))

    # What is made of it.

    @abstractmethod
    def _offered(self, payload: bytes, now: float) -> Iterator[e.Action]:
        """Something is retained where the offer is."""

    @abstractmethod
    def _said_by(self, client: str, message: m.Message, now: float) -> Iterator[e.Action]:
        """A client says something, and is believed.

        Raises:
            WireError: it is not for a server.
        """

    @abstractmethod
    def _missed(self, client: str) -> Iterator[e.Action]:
        """A client does not know of this epoch: tell it the offer."""

    @abstractmethod
    def _chunk(self, client: str, chunk: Chunk, payload: bytes, now: float) -> Iterator[e.Action]:
        """A chunk of an update has come.

        Raises:
            WireError: it was not asked for.
        """

    @abstractmethod
    def _disowned(self, client: str, now: float) -> Iterator[e.Action]:
        """What a client has announced, and is not recorded, is not believed any more."""

    @abstractmethod
    def _leaves(self, client: str, now: float) -> Iterator[e.Action]:
        """A client is gone."""

    # Listening.

    def ignores(self, topic: str, now: float) -> bool:
        """Whether what comes on a topic is not even looked at: its client is muted."""
        client = self._topics.writer(topic)
        return client is not None and self._conduct.muted(client, now)

    def _received(self, topic: str, payload: bytes, now: float) -> Iterator[e.Action]:
        if topic == self._topics.offer:
            yield from self._offered(payload, now)
            return
        client = self._topics.writer(topic)
        if client is None:
            yield from self._drop(topic, WireError(f"nobody's topic: {topic[:100]!r}"))
            return
        if self._conduct.muted(client, now):
            self.dropped += 1
            return
        chunk = None
        try:
            # What breaks the grammar is the client's too: nobody else may write there.
            _, chunk = self._topics.parse_up(topic)
        except WireError as error:
            if (yield from self._charged(client, payload, now)):
                yield from self._wrong(client, topic, error, self.voice.signs, now)
            return
        try:
            if chunk is not None and payload:
                yield from self._piece(client, chunk, payload, now)
            elif (yield from self._charged(client, payload, now)) and payload:
                yield from self._spoken(client, payload, now)
        except WireError as error:
            unproven = chunk is not None or isinstance(error, TrustError)
            yield from self._wrong(client, topic, error, unproven, now)

    def _charged(self, client: str, payload: bytes, now: float) -> Generator[e.Action, None, bool]:
        """Whether this client may say so much more."""
        allowed = self._conduct.spend(client, len(payload), now)
        if allowed is True:
            return True
        self.dropped += 1
        yield from self._struck(allowed or None, now)
        return False

    def _wrong(self, client: str, topic: str, error: WireError, unproven: bool, now: float) -> Iterator[e.Action]:
        """Drop what is wrong; a strike against its client, unless nothing but the topic shows that it is its own."""
        yield from self._drop(topic, error)
        if not unproven:
            reason = f"what is said in the name of {client}: {error}"
            yield from self._struck(self._conduct.strike(client, reason, now), now)

    def _piece(self, client: str, chunk: Chunk, payload: bytes, now: float) -> Iterator[e.Action]:
        """A chunk: free where it was asked for and is new."""
        asked, wrong = False, None
        try:
            if not self.voice.knows(client):
                raise TrustError(f"{client} is not enrolled, or not any more")
            for action in self._chunk(client, chunk, payload, now):
                asked = asked or isinstance(action, e.Keep)
                yield action
        except WireError as error:
            wrong = error
        allowed = asked or self._conduct.spend(client, len(payload), now)
        if allowed is not True:
            yield from self._struck(allowed or None, now)
        if wrong is not None:
            raise wrong

    def _drop(self, topic: str, error: WireError) -> Iterator[e.Action]:
        self.dropped += 1
        self.distrusted += isinstance(error, TrustError)
        if self.dropped == 1 or (self.distrusted == 1 and isinstance(error, TrustError)):
            yield e.Log(f"dropped a message on {printable(topic[:100])}: {error} (further ones are only counted)")

    def _struck(self, mute: Mute | None, now: float) -> Iterator[e.Action]:
        """A client is muted, where it is: nothing is asked of it."""
        if mute is None:
            return
        client, reason, seconds = mute
        reason = printable(reason)[:300]
        yield e.Log(f"{client} is not listened to for {seconds:.0f} s: {reason}")
        yield e.Misconduct(client, "muted", reason, seconds)
        if self._roster.part(client):
            yield from self._leaves(client, now)

    def _spoken(self, client: str, payload: bytes, now: float) -> Iterator[e.Action]:
        heard = self.voice.hear(client, payload)
        if heard.twin:
            yield from self._doubled(client, self._conduct.twin(client, now))
        elif heard.stale:
            yield from self._missed(client)
        else:
            yield from self._said_by(client, heard.message, now)
            # A goodbye may be said again by anybody, and who is gone is not there.
            if not isinstance(heard.message, m.Goodbye):
                self._roster.hear(client, now)

    def _doubled(self, client: str, certain: bool) -> Iterator[e.Action]:
        """Two devices speak as one client, as far as can be told."""
        if certain:
            reason = "two devices speak with this name: a copied card? give each its own"
            yield e.Log(f"{client}: {reason}")
            yield e.Misconduct(client, "twin", reason, 0.0)

    def _rekeyed(self, given: tuple[str, ...], gone: tuple[str, ...], now: float) -> Iterator[e.Action]:
        """Nothing that was said with a key that is gone is held for or against its client, but what is recorded."""
        for client in (*given, *gone):
            self._conduct.forgive(client)
            yield from self._disowned(client, now)
            if self._roster.part(client):
                yield from self._leaves(client, now)
        for client in gone:
            yield e.Log(f"{client} is not enrolled any more: nothing is asked of it, and nothing it says is believed")
