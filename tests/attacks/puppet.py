"""An enrolled device that is driven by hand: it says what it is told to say, with its own key and certificate."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import WireError
from edge_client.trust.identity import Identity
from edge_client.trust.speech import identity_voice
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Member, PlainMember

Kind = TypeVar("Kind")
_SAMPLES = 60


@dataclass
class Puppet:
    """One life of a device of the federation at ``address``; without ``signs`` it speaks as if nobody had keys."""

    address: Address
    identity: Identity
    state: Path
    wall: float
    signs: bool = True
    boot: bytes = b"puppet00"
    voice: Member = field(init=False)
    topics: Topics = field(init=False)
    offer: m.Offer = field(init=False)

    def __post_init__(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        self.voice = identity_voice(self.identity, self.state, self.wall)[0] if self.signs else PlainMember()
        self.topics = Topics(self.identity.federation)

    @property
    def client(self) -> str:
        """Its id."""
        return self.identity.client

    def __enter__(self) -> "Puppet":
        self.peer = Peer(self.address, f"puppet-{self.client}", tls=self.identity.tls).__enter__()
        self.peer.subscribe([self.topics.offer, self.topics.down(self.client)])
        self.offer = self.hear(m.Offer)
        return self

    def __exit__(self, *exception: object) -> None:
        self.peer.cut()

    def hear(self, kind: type[Kind] | tuple[type[Kind], ...], seconds: float = 60.0) -> Kind:
        """The next message of one of these kinds from the server."""
        while messages := self.peer.take(1, seconds):
            try:
                message = self.voice.hear(messages[0].payload)
            except WireError:
                continue
            if isinstance(message, kind):
                return message
        raise AssertionError(f"{self.client} heard no {kind}")

    def say(self, message: m.Message) -> bytes:
        """Say something; the bytes that went."""
        payload = self.voice.say(message, self.offer.epoch)
        self.peer.publish(self.topics.up(self.client), payload)
        return payload

    def invited(self) -> m.Invitation:
        """Say hello to each epoch that is offered, until there is an invitation."""
        while True:
            held = self.offer.bundle.sha256, 0, bytes(32)
            self.say(m.Hello(self.offer.epoch, self.boot, *held, _SAMPLES, True))
            answer = self.hear((m.Invitation, m.Offer))
            if isinstance(answer, m.Invitation):
                return answer
            self.offer = answer
