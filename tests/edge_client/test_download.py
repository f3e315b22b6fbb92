"""Pulling a blob: the window moves as chunks come, and what does not come is asked for again, ever more slowly."""

import random

import pytest

from edge_client.download import Download, Pull, check_blob
from edge_client.errors import WireError
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import piece, refer

DATA = random.Random(5).randbytes(10 * 1024)
REF = refer(DATA, chunk=1024, inline=0)


def download(window=4):
    return Download(REF, limit=len(DATA), window=window, patience=5.0)


def chunk(index):
    return piece(DATA, REF, index)


def test_the_window_moves_on_when_half_of_it_has_come():
    pull = download()
    assert pull.start(0.0) == Pull(take=(0, 1, 2, 3))
    assert pull.chunk(2, chunk(2), 1.0) == Pull()
    assert pull.chunk(2, chunk(2), 1.0) == Pull()
    assert pull.chunk(0, chunk(0), 2.0) == Pull(drop=(2, 0), take=(4, 5))
    assert pull.chunk(9, chunk(9), 2.5) == Pull()  # somebody else asked for it: taken all the same
    assert pull.wake == 7.5


@pytest.mark.parametrize("window", [1, 2, 3, 16])
def test_never_more_than_a_window_is_open_and_nothing_stays_open(window):
    pull, rng = download(window), random.Random(window)
    step = pull.start(0.0)
    subscribed = set(step.take)
    while not pull.complete:
        assert 0 < len(subscribed) <= window
        step = pull.chunk(index := rng.choice(sorted(subscribed & set(range(10)))), chunk(index), 0.0)
        subscribed = (subscribed - set(step.drop)) | set(step.take)
    assert subscribed == set()
    assert pull.take() == DATA


def test_silence_subscribes_again_then_asks_and_waits_longer_each_time():
    pull = download()
    pull.start(0.0)
    pull.chunk(0, chunk(0), 0.0)
    assert pull.tick(4.9) == Pull()
    assert pull.tick(5.0) == Pull(drop=(1, 2, 3), take=(1, 2, 3))
    assert pull.wake == 15.0
    assert pull.tick(15.0) == Pull(drop=(1, 2, 3), take=(1, 2, 3), ask=(1, 2, 3))
    now = 15.0
    for _ in range(3000):  # two days of silence
        assert pull.wake is not None
        assert pull.wake - now <= 60.0
        now = pull.wake
        assert pull.tick(now).ask == (1, 2, 3)
    assert pull.chunk(1, chunk(1), now) == Pull(drop=(0, 1), take=(4, 5))
    assert pull.wake == now + 5.0


def test_a_new_connection_starts_with_what_is_missing():
    pull = download()
    pull.start(0.0)
    for index in (0, 1, 3):
        pull.chunk(index, chunk(index), 0.0)
    assert pull.start(9.0) == Pull(take=(2, 4, 5, 6))
    assert pull.wake == 14.0


def test_giving_up_leaves_nothing_subscribed():
    pull = download()
    pull.start(0.0)
    pull.chunk(1, chunk(1), 0.0)
    assert pull.stop() == Pull(drop=(1, 0, 2, 3))
    assert pull.wake is None


def test_damaged_bytes_are_forgotten():
    pull = download(window=16)
    pull.start(0.0)
    for index in range(10):
        pull.chunk(index, bytes(1024), 0.0)
    with pytest.raises(WireError, match="SHA-256"):
        pull.take()
    # Which of what is retained is damaged is not known: the server is asked for all, as they are pulled.
    assert pull.start(1.0) == Pull(take=tuple(range(10)), ask=tuple(range(10)))


def test_what_came_damaged_is_left_alone_for_a_while_and_longer_each_time():
    pull, now, waits = download(window=16), 0.0, []
    pull.start(now)
    for _ in range(9):
        for index in range(10):
            pull.chunk(index, bytes(1024), now)
        with pytest.raises(WireError, match="SHA-256"):
            pull.take()
        assert pull.rest(now) == Pull()  # nothing is subscribed to any more
        assert pull.start(now) == pull.tick(now) == pull.chunk(0, bytes(1024), now) == Pull()
        waits.append(pull.wake - now)
        now = pull.wake
        assert len(pull.tick(now).take) == 10
    assert waits == [min(600.0, 5.0 * 2**n) for n in range(9)]


def test_too_large_a_blob_is_refused():
    with pytest.raises(WireError, match="10240 bytes"):
        Download(REF, limit=10_239)
    with pytest.raises(WireError, match="10240 bytes; 1 to 10239"):
        check_blob(REF, 10_239)
    with pytest.raises(WireError, match="blob of 0 bytes"):
        check_blob(BlobRef(bytes(32), 0, 1024), 10)
    with pytest.raises(WireError, match="were named"):
        check_blob(BlobRef(bytes(32), 1, 1024, b"x"), 10)
    check_blob(REF, 10_240)
