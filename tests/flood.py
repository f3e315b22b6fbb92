"""A device that floods its broker: ``python -m tests.flood IDENTITY PORT TOPIC PAYLOAD --rate 10000 --seconds 30``.

It writes packets by hand, so that ten thousand a second cost it a fraction of a core and the rest is left for those who
have to bear them. It waits for nothing: acknowledgements are read and thrown away.
"""

import argparse
import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edge_client.tls import Tls

_SLICE = 0.02
"""Seconds between two volleys."""


@contextlib.contextmanager
def connection(context: ssl.SSLContext, port: int, name: str = "flood") -> Iterator[ssl.SSLSocket]:
    """A device's connection to a broker on loopback, on which MQTT's CONNECT was accepted: for bytes made by hand."""
    with socket.create_connection(("127.0.0.1", port)) as plain:
        plain.settimeout(10)
        with context.wrap_socket(plain, server_hostname="localhost") as raw:
            body = b"\x00\x04MQTT\x04\x02\x00\x3c" + len(name).to_bytes(2, "big") + name.encode()
            raw.sendall(b"\x10" + encoded(len(body)) + body)
            assert raw.recv(4)[:2] == b"\x20\x02"
            yield raw


def encoded(length: int) -> bytes:
    """A remaining length (MQTT 3.1.1, 2.2.3)."""
    found = bytearray()
    while length or not found:
        length, digit = divmod(length, 128)
        found.append(digit | (128 if length else 0))
    return bytes(found)


def packet(topic: str, payload: bytes, number: int) -> bytes:
    """A PUBLISH of quality of service 1, which the broker keeps until its reader has acknowledged it."""
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + number.to_bytes(2, "big") + payload
    return b"\x32" + encoded(len(body)) + body


def flood(raw: ssl.SSLSocket, packets: list[bytes], rate: float, seconds: float) -> int:
    """Send at a rate, in volleys; how many went. What the broker does not take in time is not made up for."""
    raw.setblocking(False)
    began, sent, rest = time.monotonic(), 0, b""
    while (passed := time.monotonic() - began) < seconds:
        if not rest:
            due = min(int(rate * passed) - sent, int(rate * _SLICE * 5))
            rest, sent = b"".join(packets[(sent + at) % len(packets)] for at in range(due)), sent + due
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            while rest:
                rest = rest[raw.send(rest) :]
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            while raw.recv(65_536):
                pass
        time.sleep(_SLICE)
    return sent


def main() -> None:
    """Flood, and say what was sent and what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("identity", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("topic")
    parser.add_argument("payload", type=bytes.fromhex)
    parser.add_argument("--rate", type=float, default=10_000.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    packets = [packet(given.topic, given.payload, number) for number in range(1, 1001)]
    began, lost = time.monotonic(), ""
    sent = 0
    with connection(Tls.of(given.identity).context(), given.port) as raw:
        try:
            sent = flood(raw, packets, given.rate, given.seconds)
        except OSError as error:
            lost = str(error)
    passed = time.monotonic() - began
    said = {"sent": sent, "seconds": passed, "share_of_a_core": time.process_time() / passed, "lost": lost}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
