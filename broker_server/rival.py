"""Two servers of one federation: the second refuses while the first lives, wherever that runs.

The lock on the ledger tells only of this machine. So the second asks through the broker, as a client that missed the
offer would: a server that lives answers with it. One that does not, because it is cut off, finds the newer epoch when
it is back, and ends.
"""

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING

from broker_server.config import Federation
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import LedgerError, TransportError, WireError
from edge_client.tls import Tls
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.voice import Member, PlainMember

if TYPE_CHECKING:
    from broker_server.keyring import Keyring

_OFFER = 1.0
"""Seconds in which a broker has sent a retained message."""
_ANSWER = 1.5
"""Seconds for a living server to answer in; it is asked twice."""


async def refuse_rival(
    settings: Federation, address: Address, tls: Tls | None = None, keyring: "Keyring | None" = None
) -> None:
    """Return when no other server of the federation lives; our own broker has none.

    With ``keyring`` it is asked with the federation's own signature, and only an answer with one counts.

    Raises:
        LedgerError: one does.
    """
    if settings.broker.url:
        epoch = await asyncio.to_thread(_living, settings.federation.name, address, tls, keyring)
        if epoch is not None:
            raise LedgerError(
                f"federation {settings.federation.name!r}: another server of it lives at broker {address} "
                f"(epoch {epoch}); stop that one, or give this federation another name"
            )


def _living(federation: str, address: Address, tls: Tls | None, keyring: "Keyring | None") -> int | None:
    """The epoch of a living server, None where none answers."""
    topics, name = Topics(federation), f"fs-{secrets.token_hex(4)}"
    voice: Member = PlainMember() if keyring is None else keyring.member(federation, name)
    # A broker that is gone again will be found again, or not, by the server itself.
    with contextlib.suppress(TransportError), Peer(address, name, tls=tls) as peer:
        peer.subscribe([topics.offer, topics.down(name)])
        offer = _offer(peer, voice, topics.offer, _OFFER)
        if offer is None or offer.finished:
            return None
        missed = m.Hello(0, secrets.token_bytes(8), offer.bundle.sha256, 0, bytes(32), 0, available=False)
        for _ in range(2):
            peer.send(topics.up(name), voice.say(missed, 0))
            answer = _offer(peer, voice, topics.down(name), _ANSWER)
            if answer is not None:
                return answer.epoch
    return None


def _offer(peer: Peer, voice: Member, topic: str, seconds: float) -> m.Offer | None:
    """The first offer on a topic."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        for heard in peer.take(1, left):
            with contextlib.suppress(WireError):
                message = voice.hear(heard.payload)
                if heard.topic == topic and isinstance(message, m.Offer):
                    return message
    return None
