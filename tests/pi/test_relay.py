import socket
from contextlib import closing

import pytest

from tests.pi.relay import Relay

SECONDS = 10.0


@pytest.fixture
def line():
    """A relay, the side of the guest, and what the broker accepts."""
    with socket.create_server(("127.0.0.1", 0)) as broker, closing(Relay(broker.getsockname()[1])) as relay:
        near = socket.create_connection(("127.0.0.1", relay.port))
        far, _ = broker.accept()
        near.settimeout(SECONDS)
        far.settimeout(SECONDS)
        with near, far:
            yield relay, near, far


def test_it_passes_on_what_is_sent_in_both_directions(line):
    _, near, far = line
    near.sendall(b"up")
    assert far.recv(10) == b"up"
    far.sendall(b"down")
    assert near.recv(10) == b"down"


def test_it_stops_at_the_byte_that_was_chosen_and_the_far_side_sees_nothing_of_the_rest(line):
    relay, near, far = line
    near.sendall(b"a" * 10)
    assert far.recv(100) == b"a" * 10
    relay.stop_after(5)
    assert not relay.stopped(0.0)
    near.sendall(b"b" * 5)
    assert relay.stopped(SECONDS)
    far.settimeout(0.05)
    with pytest.raises(TimeoutError):
        far.recv(100)
    # The power is gone: the broker sees the end, and nothing of what was held.
    relay.renew()
    far.settimeout(SECONDS)
    assert far.recv(100) == b""
