"""How the two sides say things to each other and what they believe: plainly, or signed, counted and dated.

The state machines are handed one of these. It holds counters and no keys: signing and verifying are functions. Plain
voices neither sign nor ask for signatures; they are for loopback and for brokers that are trusted.

Whoever stands between the two can hold a signed message back. He cannot change it, give it to another client or another
federation, or say it again: each side believes a stamp (`envelope.Stamp`) once, in rising order, and only one of this
life of the device and of the newest epoch of the server. A new life and a new epoch leave everything behind that was
said before them, so neither side has to store a counter for each message.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from edge_client.errors import TrustError, WireError
from edge_client.wire import messages as m
from edge_client.wire.envelope import EVERYONE, SERVER, Envelope, Stamp, covered, unwrap, wrap

Sign = Callable[[bytes], bytes]
_HELLO = next(number for number, kind in m.TABLE.items() if kind is m.Hello)
_OFFER = next(number for number, kind in m.TABLE.items() if kind is m.Offer)
_GOODBYE = next(number for number, kind in m.TABLE.items() if kind is m.Goodbye)


class Heard(NamedTuple):
    """What the server makes of a client's message."""

    message: m.Message
    stale: bool = False
    """It was said under an older epoch: all that it tells is that the client has missed the offer."""
    twin: bool = False
    """Another device speaks with this one's key; nothing else can be made of it."""


class Member(Protocol):
    """A client's side."""

    def say(self, message: m.Message, epoch: int) -> bytes:
        """A message to the server, under the epoch that the client follows."""

    def hear(self, payload: bytes) -> m.Message:
        """A message from the server.

        Raises:
            WireError: it is no message, or (TrustError) is not believed.
        """

    @property
    def newest(self) -> Stamp:
        """The newest offer that was believed, in whatever life of the device; all zeros where there is none."""

    @property
    def passed(self) -> float:
        """A time that certainly has passed, seconds since 1970, whatever a clock shows; 0 where none is known."""


class Host(Protocol):
    """The server's side."""

    @property
    def signs(self) -> bool:
        """Whether what clients say is signed: a topic alone then shows nothing."""

    def knows(self, client: str) -> bool:
        """Whether a client may say anything at all: it has a key, where one is needed."""

    def tell(self, client: str, message: m.Message) -> bytes:
        """A message to one client."""

    def proclaim(self, offer: m.Offer) -> bytes:
        """An offer to all; it replaces those before it."""

    def hear(self, client: str, payload: bytes) -> Heard:
        """A message from a client.

        Raises:
            WireError: it is no message, or (TrustError) is not believed.
        """

    def overhear(self, payload: bytes) -> tuple[m.Message, Stamp]:
        """A message to all, by this server or another one of the federation, with when it was said.

        Raises:
            WireError: it is no message, or (TrustError) is not believed.
        """


class PlainMember:
    """A client that neither signs nor asks for signatures."""

    newest = Stamp(0, 0, 0)
    passed = 0.0

    def say(self, message: m.Message, epoch: int) -> bytes:
        """The message, not signed."""
        del epoch
        return m.encode(message)

    def hear(self, payload: bytes) -> m.Message:
        """Whatever is said."""
        return m.decode(payload)


class PlainHost:
    """A server that neither signs nor asks for signatures."""

    signs = False

    def knows(self, client: str) -> bool:
        """Everybody is believed."""
        del client
        return True

    def tell(self, client: str, message: m.Message) -> bytes:
        """The message, not signed."""
        del client
        return m.encode(message)

    def proclaim(self, offer: m.Offer) -> bytes:
        """The offer, not signed."""
        return m.encode(offer)

    def hear(self, client: str, payload: bytes) -> Heard:
        """Whatever is said."""
        del client
        return Heard(m.decode(payload))

    def overhear(self, payload: bytes) -> tuple[m.Message, Stamp]:
        """Whatever is said."""
        message = m.decode(payload)
        return message, Stamp(message.epoch if isinstance(message, m.Offer) else 0, 0, 0)


@dataclass
class SignedMember:
    """A client that signs, and believes what is signed with the federation's key.

    ``life`` is higher than that of every earlier start of the device; ``newest`` is the newest offer that any of them
    believed, ``passed`` a time that certainly has passed. ``verify`` takes data and signature.
    """

    federation: str
    client: str
    life: int
    sign: Sign
    verify: Callable[[bytes, bytes], bool]
    newest: Stamp = field(default_factory=lambda: Stamp(0, 0, 0))
    passed: float = 0.0
    _said: int = 0
    _told: Stamp = field(init=False)

    def __post_init__(self) -> None:
        self._told = Stamp(self.newest.epoch, self.life, 0)

    def say(self, message: m.Message, epoch: int) -> bytes:
        """The message, signed and counted."""
        if isinstance(message, m.Goodbye):
            stamp = Stamp(0, self.life, 0)  # also a last will, which is made before there is an offer
        else:
            self._said += 1
            stamp = Stamp(epoch, self.life, self._said)
        return _signed(self.federation, self.client, SERVER, message, stamp, self.sign)

    def hear(self, payload: bytes) -> m.Message:
        """What the server says to this life of the device, and offers that are not older than the newest one.

        Raises:
            WireError: it is no message; or (TrustError) signed by nobody or somebody else, changed, or said again.
        """
        envelope = unwrap(payload)
        stamp = _stamp(envelope)
        if envelope.number == _OFFER:
            return self._offered(envelope, stamp)
        if stamp.life != self.life:
            raise TrustError(f"said to another life of this device ({stamp.life}, this is {self.life})")
        if stamp <= self._told:
            raise TrustError(f"said before: {_shown(stamp)} is not after {_shown(self._told)}")
        self._check(envelope, stamp, self.client)
        message = m.unpack(envelope)
        self._told = stamp
        return message

    def _offered(self, envelope: Envelope, stamp: Stamp) -> m.Message:
        if stamp < self.newest:
            raise TrustError(f"an old offer: {_shown(stamp)} is before {_shown(self.newest)}")
        self._check(envelope, stamp, EVERYONE)
        message = m.unpack(envelope)
        if isinstance(message, m.Offer):
            if message.epoch != stamp.epoch:
                raise TrustError(f"an offer of epoch {message.epoch} that was said in epoch {stamp.epoch}")
            self.passed = max(self.passed, message.issued)
        self.newest = stamp
        # What an older server has said is over, also what it has not been heard to say.
        self._told = max(self._told, Stamp(stamp.epoch, self.life, 0))
        return message

    def _check(self, envelope: Envelope, stamp: Stamp, recipient: str) -> None:
        data = covered(self.federation, SERVER, recipient, envelope.number, stamp, bytes(envelope.body))
        if not self.verify(data, envelope.signature):
            raise TrustError("the signature is not the federation's, or the message was changed on its way")


@dataclass
class _Known:
    """What the server remembers of a device in this epoch."""

    stamp: Stamp
    before: Stamp
    """The last of the life before this one."""
    boot: bytes = b""

    def odd(self, number: int, stamp: Stamp) -> bool:
        """Whether this may be another device's, and not just something that is said again."""
        return number == _HELLO or (stamp.life == self.before.life and stamp > self.before)

    def is_twin(self, message: m.Message, stamp: Stamp) -> bool:
        """Whether another device says this: in this life with another boot nonce, or in the one before, and not again.

        The second may also be something that was on its way for long.
        """
        if stamp.life == self.stamp.life:
            return isinstance(message, m.Hello) and self.boot not in (b"", message.boot)
        if stamp.life == self.before.life and stamp > self.before:
            self.before = stamp
            return True
        return False

    def take(self, message: m.Message | None, stamp: Stamp) -> None:
        """The device has said this; None is something that is no message."""
        if stamp.life > self.stamp.life:
            self.before, self.boot = self.stamp, b""
        self.stamp = stamp
        if isinstance(message, m.Hello):
            self.boot = message.boot


@dataclass
class SignedHost:
    """A server that signs, and believes what is signed with the key of the device that the topic names.

    ``keys`` gives a device's public key, None where there is no such device (any more); ``verify`` takes public key,
    data and signature, ``verify_own`` data and signature of this federation's servers.
    """

    federation: str
    epoch: int
    sign: Sign
    keys: Callable[[str], bytes | None]
    verify: Callable[[bytes, bytes, bytes], bool]
    verify_own: Callable[[bytes, bytes], bool]
    _said: int = 0
    _offers: int = 0
    _known: dict[tuple[str, bytes], _Known] = field(default_factory=dict)
    """By client and key: what was said with a key that comes back is not believed once more."""
    signs = True

    def knows(self, client: str) -> bool:
        """Whether there is such a device."""
        return self.keys(client) is not None

    def tell(self, client: str, message: m.Message) -> bytes:
        """The message, signed, for the life of the device that was heard last.

        One that was not heard in this epoch does not believe it; it speaks first.
        """
        self._said += 1
        key = self.keys(client)
        known = None if key is None else self._known.get((client, key))
        stamp = Stamp(self.epoch, 0 if known is None else known.stamp.life, self._said)
        return _signed(self.federation, SERVER, client, message, stamp, self.sign)

    def proclaim(self, offer: m.Offer) -> bytes:
        """The offer, signed and counted."""
        self._offers += 1
        return _signed(self.federation, SERVER, EVERYONE, offer, Stamp(self.epoch, 0, self._offers), self.sign)

    def hear(self, client: str, payload: bytes) -> Heard:
        """What a device says, once.

        Raises:
            TrustError: it is no envelope, of no device that is enrolled, signed by somebody else, changed, or said
                again: nothing shows that the device says it now.
            WireError: the device has signed it, and it is no message.
        """
        try:
            envelope = unwrap(payload)
        except WireError as error:
            raise TrustError(f"not signed: {error}") from error
        stamp = _stamp(envelope)
        key = self.keys(client)
        if key is None:
            raise TrustError(f"{client} is not enrolled, or not any more")
        if stamp.epoch > self.epoch:
            raise TrustError(f"said in epoch {stamp.epoch}, and this server has {self.epoch}")
        if envelope.number == _GOODBYE or stamp.epoch < self.epoch:
            # An end that a broker invents or repeats costs time, as one does that it keeps silent about.
            try:
                message = self._verified(client, key, envelope, stamp)
            except WireError as error:
                raise TrustError(f"of another epoch: {error}") from error
            return Heard(message, stale=envelope.number != _GOODBYE)
        known = self._known.get((client, key))
        again = known is not None and stamp <= known.stamp
        if known is not None and again and not known.odd(envelope.number, stamp):
            raise TrustError(f"said before: {_shown(stamp)} is not after {_shown(known.stamp)}")
        try:
            message = self._verified(client, key, envelope, stamp)
        except WireError as error:
            if again or isinstance(error, TrustError):
                raise TrustError(str(error)) from error
            self._known.setdefault((client, key), _Known(stamp, Stamp(self.epoch, 0, 0))).take(None, stamp)
            raise
        if known is not None and known.is_twin(message, stamp):
            return Heard(message, twin=True)
        if known is not None and again:
            raise TrustError(f"said before: {_shown(stamp)} is not after {_shown(known.stamp)}")
        self._known.setdefault((client, key), _Known(stamp, Stamp(self.epoch, 0, 0))).take(message, stamp)
        return Heard(message)

    def overhear(self, payload: bytes) -> tuple[m.Message, Stamp]:
        """What a server of this federation says to all.

        Raises:
            WireError: it is no message; or (TrustError) signed by somebody else, or changed.
        """
        envelope = unwrap(payload)
        stamp = _stamp(envelope)
        data = covered(self.federation, SERVER, EVERYONE, envelope.number, stamp, bytes(envelope.body))
        if not self.verify_own(data, envelope.signature):
            raise TrustError("the signature is not the federation's, or the message was changed on its way")
        return m.unpack(envelope), stamp

    def _verified(self, client: str, key: bytes, envelope: Envelope, stamp: Stamp) -> m.Message:
        data = covered(self.federation, client, SERVER, envelope.number, stamp, bytes(envelope.body))
        if not self.verify(key, data, envelope.signature):
            raise TrustError(f"the signature is not that of {client}, or the message was changed on its way")
        return m.unpack(envelope)


def _signed(federation: str, sender: str, recipient: str, message: m.Message, stamp: Stamp, sign: Sign) -> bytes:
    number, body = m.pack(message)
    return wrap(number, body, sign(covered(federation, sender, recipient, number, stamp, body)), stamp)


def _stamp(envelope: Envelope) -> Stamp:
    if envelope.stamp is None or not envelope.signature:
        raise TrustError("not signed, and this federation signs what it says")
    return envelope.stamp


def _shown(stamp: Stamp) -> str:
    return f"{stamp.epoch}/{stamp.life}/{stamp.count}"
