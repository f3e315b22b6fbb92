"""How large a message a broker takes: found by sending some, because hardly any broker says."""

from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls

OVERHEAD = 1024
"""Bytes that a message may need beside the blob that travels inside it."""
LEAST = 2048
"""Bytes of the smallest message limit that fedge can live with: a chunk of 1 KiB, and room beside it."""
_STEP = 1024
_ECHO = 5.0
"""Seconds within which a small message must come back."""
_SLOW = 20.0
"""Seconds for a large one: a link may be slow."""
_GRACE = 0.3
"""Seconds that a message may come after one that was sent later, before it counts as dropped."""


def largest_payload(address: Address, name: str, root: str, most: int, tls: Tls | None = None) -> int | None:
    """Bytes of the largest payload up to ``most`` that comes back to who published it, to within 1 KiB.

    None where not even a small one does: this user may not publish and subscribe below ``root``.

    Some brokers drop what is too large and acknowledge it, some end the connection; a small message behind it tells
    the first apart from a slow link. Topics are as long as fedge's longest, below ``root``.

    Raises:
        TransportError: the broker cannot be reached, or no longer.
    """
    most = min(most, _told(address, name, root, most, tls))
    scale = _Scale(address, name, root, tls)
    try:
        if not scale.answers():
            return None
        if scale.carries(most):
            return most
        # Largest known to pass, smallest known to fail, in steps.
        low, high = 0, -(-most // _STEP)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if scale.carries(middle * _STEP) else (low, middle)
        return low * _STEP
    finally:
        scale.close()


def fitting(limit: int, chunk: int) -> int:
    """Bytes in the largest chunk, up to ``chunk``, that passes where payloads of ``limit`` bytes do.

    A message with a blob of that size inside it passes too.
    """
    room = (limit - OVERHEAD) // _STEP * _STEP
    return min(chunk, room)


def _told(address: Address, name: str, root: str, most: int, tls: Tls | None) -> int:
    """What an MQTT 5 broker says of itself, as bytes of payload; ``most`` where it says nothing."""
    try:
        with Peer(address, name, version=5, tls=tls) as peer:
            packet = peer.largest_packet
    except TransportError:
        return most
    return most if packet is None else max(0, packet - len(_long(root)) - 16)


def _long(root: str) -> str:
    """A topic as long as that of an upload's chunk."""
    return f"{root}/{'x' * max(1, 212 - len(root))}"


class _Scale:
    """Weighs payloads, on one connection for as long as the broker leaves it standing."""

    def __init__(self, address: Address, name: str, root: str, tls: Tls | None) -> None:
        self._address, self._name, self._topic, self._tls = address, name, _long(root), tls
        self._peer: Peer | None = None
        self._count = 0

    def answers(self) -> bool:
        """Whether a small payload comes back."""
        peer = self._ready()
        peer.send(self._topic, b"echo")
        return bool(peer.take(1, _ECHO))

    def carries(self, size: int) -> bool:
        """Whether a payload of ``size`` bytes comes back."""
        peer = self._ready()
        self._count += 1
        payload = self._count.to_bytes(4, "big").ljust(size, b"\0")[:size]
        marker = b"end of %d" % self._count
        peer.send(self._topic, payload)
        peer.send(self._topic, marker)
        heard = []
        while not peer.lost and (message := peer.take(1, _GRACE if marker in heard else _SLOW)):
            heard.append(message[0].payload)
            if payload in heard:
                return True
            if len(heard) > 2:
                break
        return False

    def close(self) -> None:
        """Disconnect."""
        if self._peer is not None:
            self._peer.__exit__(None, None, None)

    def _ready(self) -> Peer:
        if self._peer is not None and not self._peer.lost:
            self._peer.heard.clear()
            return self._peer
        self.close()
        self._peer = peer = Peer(self._address, self._name, tls=self._tls).__enter__()
        peer.subscribe([self._topic])
        return peer
